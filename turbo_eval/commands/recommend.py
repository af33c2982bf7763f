"""turbo-eval recommend: the cheapest pair for a model within a quality bound."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from turbo_eval.commands import options as o


def register(app: typer.Typer) -> None:
    app.command(
        help="""Name the cheapest K/V pair for a model within a bound, from records of this build
        and machine; runs a short sweep first if there are none.

        Exit code 0: a pair is named; 1: none is within the bound.

          turbo-eval recommend qwen2.5-coder-0.5b --max-delta-ppl 3% --ctx 32768

          turbo-eval recommend my.gguf --max-kld 0.02 --memory 2
        """
    )(recommend)


def recommend(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    max_kld: Annotated[float | None, typer.Option(help="Largest mean KL divergence, in nats.")] = None,
    max_delta_ppl: Annotated[str | None, typer.Option(help="Largest ΔPPL, e.g. 3%.")] = None,
    ctx: Annotated[int | None, typer.Option(help="Context to size for (default: the model's).")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory for the KV cache, in GiB.")] = None,
    corpus: o.Corpus = None,
    chunks: o.Chunks = None,
    backend: o.Backend = None,
    threads: o.Threads = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
) -> None:
    from turbo_eval.analysis.recommend import Bound
    from turbo_eval.analysis.recommend import recommend as rank
    from turbo_eval.analysis.table import by_setting, summarize
    from turbo_eval.errors import UsageError
    from turbo_eval.inputs.models import resolve_model
    from turbo_eval.llama.provenance import collect
    from turbo_eval.records.store import Store
    from turbo_eval.util.paths import results_dir

    percent = _percent(max_delta_ppl)
    if max_kld is None and percent is None:
        percent = 3.0
        print("turbo-eval: no bound was given, taking --max-delta-ppl 3%", file=sys.stderr)
    bound = Bound(max_kld, percent, memory)
    file = resolve_model(model)
    window = ctx or file.gguf.n_ctx_train
    if window < 1:
        raise UsageError(f"--ctx {window} is no context")
    build = o.load_build(backend or "cpu", bin_dir)
    provenance = collect(build)
    store = Store(results or results_dir(), provenance.machine.id)
    needed = ("kld",) if max_kld is not None else ("ppl", "kld")
    known = [
        r
        for r in store.all()
        if r.cell.model_sha256 == file.sha256
        and r.cell.tree == build.tree
        and r.cell.backend == (backend or "cpu")
    ]
    groups = [
        rows
        for _, rows in by_setting(summarize(known))
        if len([r for r in rows if any(r.get(m) for m in needed)]) > 1
        and (percent is None or any(r.delta_pct is not None for r in rows))
    ]
    if not groups:
        groups = [_short_sweep(model, corpus, chunks, threads, build, provenance, store, max_kld is not None)]
    # Records of several settings: the one with the most text decides, then the one with most pairs.
    rows = max(groups, key=lambda g: (g[0].ctx * g[0].chunks, len(g)))
    ranked = rank(rows, file.gguf, window, bound)
    first = rows[0]
    print(
        f"{file.name}, {first.corpus}, {first.chunks} chunks of {first.ctx} tokens, anchor {first.anchor},"
        f" KV cache at {window} tokens:"
    )
    good = [c for c in ranked if not c.reasons]
    for label, candidate in zip(("recommended", "runner-up"), good, strict=False):
        row = candidate.row
        print(
            f"{label:12} {row.k}/{row.v}: {candidate.memory_mib:.0f} MiB"
            f" ({row.bpv_k:g}/{row.bpv_v:g} bits per value), {candidate.figures()}"
        )
    for candidate in ranked:
        if candidate.reasons:
            row = candidate.row
            print(
                f"{'not':12} {row.k}/{row.v}: {candidate.memory_mib:.0f} MiB, {'; '.join(candidate.reasons)}"
            )
    if not good:
        print("turbo-eval: no pair on record is within the bound", file=sys.stderr)
        raise typer.Exit(1)


def _percent(text: str | None) -> float | None:
    from turbo_eval.errors import UsageError

    if text is None:
        return None
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        raise UsageError(f"--max-delta-ppl {text!r} is no percentage", "write it like 3%") from None
    return value


SHORT = (
    "f16:f16",
    "q8_0:q8_0",
    "q8_0:turbo4",
    "q8_0:turbo3",
    "q4_0:q4_0",
    "turbo4:turbo4",
    "turbo4:turbo3",
    "turbo3:turbo3",
)


def _short_sweep(
    model: str,
    corpus: str | None,
    chunks: int | None,
    threads: int | None,
    build: Any,
    provenance: Any,
    store: Any,
    kld: bool,
) -> list[Any]:
    """Measure the usual pairs that the build knows."""
    from turbo_eval.analysis.table import summarize
    from turbo_eval.llama.tool import capabilities
    from turbo_eval.sweep.plan import make_plan
    from turbo_eval.sweep.progress import live
    from turbo_eval.sweep.run import run_sweep
    from turbo_eval.sweep.spec import sweep_spec

    known = capabilities(build).cache_types
    pairs = [p for p in SHORT if set(p.split(":")) <= known]
    print(f"turbo-eval: no records of {model} yet, measuring {len(pairs)} pairs first", file=sys.stderr)
    data: dict[str, Any] = {"model": model, "pairs": pairs, "chunks": chunks or 8, "backend": build.backend}
    data["metrics"] = ["kld"] if kld else ["ppl"]
    data |= {k: v for k, v in (("corpus", corpus), ("threads", threads)) if v is not None}
    plan = make_plan(sweep_spec(data, "recommend"), build)
    with live(plan) as reporter:
        result = run_sweep(plan, provenance, store, reporter)
    return summarize(result.records, plan.spec.baseline)
