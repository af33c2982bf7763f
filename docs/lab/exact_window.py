"""KL divergence over the size of the exact window: measured with llama-kv-eval, kept as small records, drawn.

    python docs/lab/exact_window.py measure F32.gguf TEXT --ctx 512 --chunks 4 --out X.json
    python docs/lab/exact_window.py draw docs/lab/exact-window/*.json --out docs/img/exact-window.svg

Weights in F32, as `llama-quantize --allow-requantize MODEL.gguf F32.gguf f32` makes them: nothing but the
cache makes a difference then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from turbo_eval.evidence.kv_eval import KvEval, read_kv_eval
from turbo_eval.llama.build import find_build
from turbo_eval.util.files import writing

SIZES = (0, 16, 32, 64, 128, 256)


def measure(model: Path, text: Path, pair: str, ctx: int, chunks: int, threads: int) -> dict[str, Any]:
    """All sizes of the window in one process, against f16/f16 without anchor and window."""
    build = find_build("cpu")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kv-eval.bin"
        argv: list[str | Path] = [build.tool("llama-kv-eval"), "-m", model, "-f", text, "--out", out]
        argv += ["-c", str(ctx), "-b", str(ctx), "--chunks", str(chunks), "-fa", "on", "-t", str(threads)]
        for size in SIZES:
            argv += ["--pair", f"{pair},recent={size},first={4 if size else 0}"]
        subprocess.run(argv, check=True)
        return record(read_kv_eval(out), model.stem, build.tree)


def record(found: KvEval, model: str, tree: str) -> dict[str, Any]:
    """What is kept: mean KL divergence in nats and its standard error, by size of the window."""
    points = []
    for number, run in enumerate(found.runs):
        if number == 0:
            continue
        kld = found.figures(number).kld
        error = float(kld.std(ddof=1)) / kld.size**0.5
        points.append(
            {
                "recent": run.recent,
                "first": run.first,
                "kld": round(float(kld.mean()), 6),
                "err": round(error, 6),
                "tokens": kld.size,
            }
        )
    pair = f"{found.runs[1].type_k}/{found.runs[1].type_v}"
    kind = next((run.recent_type for run in found.runs if run.recent_type), "")
    return {
        "model": model,
        "pair": pair,
        "ctx": found.header.n_ctx,
        "chunks": len(found.figures(1).chunks),
        "window_type": kind,
        "text": "wiki.test.raw",
        "tree": tree,
        "points": points,
    }


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """One line a record; R = 0 stands left of the broken axis' first power of two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 half a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, kept in enumerate(records):
        at = [SIZES.index(point["recent"]) for point in kept["points"]]
        values = [point["kld"] for point in kept["points"]]
        errors = [point["err"] for point in kept["points"]]
        label = f"{kept['model']}, {kept['ctx']} tokens × {kept['chunks']}"
        axes.errorbar(at, values, yerr=errors, marker="os^Dv"[number % 5], capsize=2, label=label)
    axes.set_xticks(range(len(SIZES)), [str(size) for size in SIZES])
    axes.set_yscale("log")
    axes.set_xlabel("recent tokens kept exact, R (F = 4; nothing at R = 0)")
    axes.set_ylabel("KL divergence from f16/f16 [nats]")
    axes.set_title(f"{records[0]['pair']}, window in {records[0]['window_type']}", fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    with writing(out):
        figure.savefig(out, format=out.suffix[1:], metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(description="KL divergence over the size of the exact window.")
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("measure")
    one.add_argument("model", type=Path)
    one.add_argument("text", type=Path)
    one.add_argument("--pair", default="turbo3:turbo3")
    one.add_argument("--ctx", type=int, default=512)
    one.add_argument("--chunks", type=int, default=4)
    one.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    one.add_argument("--name", help="the model's name in the record, else the file's")
    one.add_argument("--out", type=Path, required=True)
    other = steps.add_parser("draw")
    other.add_argument("records", type=Path, nargs="+")
    other.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.step == "measure":
        kept = measure(args.model, args.text, args.pair, args.ctx, args.chunks, args.threads)
        kept["model"] = args.name or kept["model"]
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
    else:
        draw([json.loads(path.read_text()) for path in args.records], args.out)


if __name__ == "__main__":
    main()
