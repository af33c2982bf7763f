"""turbo-eval bench: speed over depth, with the quality of the same pair beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbo_eval.commands import options as o

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from turbo_eval.bench.run import BenchRecord
    from turbo_eval.records.record import Record


def register(app: typer.Typer) -> None:
    app.command(
        help="""Measure prefill and decode speed over depth, interleaved with f16 of the same build.

        Exit code 0: every pair ran; 3: some did not.

          turbo-eval bench --model qwen2.5-coder-0.5b --pairs turbo3:turbo3,q8_0:turbo3 --depths 0,4096

          turbo-eval bench --synthetic 8b --backend cuda --depths 0,16384,65536 --plot speed.svg
        """
    )(bench)


def bench(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model by name or path.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Random weights of a shape: 8b, 1b, tiny or layers=…,heads=…")
    ] = None,
    pairs: Annotated[
        str, typer.Option("--pairs", "-p", help="K:V,K:V,…")
    ] = "q8_0:q8_0,turbo4:turbo4,turbo3:turbo3",
    depths: Annotated[str, typer.Option(help="Tokens in the cache before the test.")] = "0,4096",
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill test; 0: none.")] = 256,
    gen: Annotated[int, typer.Option(help="Tokens of the decode test; 0: none.")] = 32,
    reps: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    backend: o.Backend = None,
    threads: o.Threads = None,
    anchor: o.Anchor = None,
    timeout: o.Timeout = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: .svg or .png.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
) -> None:
    from turbo_eval.bench.run import BenchPlan, run_bench
    from turbo_eval.errors import UsageError
    from turbo_eval.formats.cache_types import parse_pair
    from turbo_eval.inputs.models import resolve_model
    from turbo_eval.inputs.synthetic import parse_shape, synthetic_model
    from turbo_eval.llama.provenance import collect
    from turbo_eval.llama.tool import capabilities, check_types
    from turbo_eval.records.store import Store
    from turbo_eval.sweep.plan import check_anchors, check_blocks
    from turbo_eval.util.paths import results_dir

    if (model is None) == (synthetic is None):
        raise UsageError("name a model or a synthetic shape", "give --model or --synthetic, not both")
    if prompt < 0 or gen < 0 or prompt + gen == 0 or reps < 1:
        raise UsageError(
            "there is nothing to measure", "give --prompt or --gen above 0 and --reps of 1 or more"
        )
    wanted = tuple(parse_pair(p) for p in pairs.split(",") if p.strip())
    build = o.load_build(backend or "cpu", bin_dir)
    check_types(build, wanted)
    file = resolve_model(str(synthetic_model(parse_shape(synthetic))) if synthetic else model or "")
    for pair in wanted:
        check_blocks(file, pair)
    anchors = check_anchors(tuple(o.split(anchor) or ()) or None, build)
    plan = BenchPlan(
        pairs=wanted,
        depths=_depths(depths),
        prompt=prompt,
        gen=gen,
        reps=reps,
        threads=threads or os.cpu_count() or 1,
        backend=backend or "cpu",
        anchors=anchors if capabilities(build).kv_anchor else (None,),
        timeout=timeout,
    )
    provenance = collect(build)
    store = Store(results or results_dir(), provenance.machine.id)
    records = run_bench(
        plan,
        file,
        build,
        provenance,
        store.dir / "bench",
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    known = store.all()
    if as_json:
        print(json.dumps(_rows(records, known), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(speed_table(records, known))
    if plot is not None:
        from turbo_eval.analysis.figures import save, speed_figure

        save(speed_figure(records), plot)
    failed = [r for r in records if r.status != "ok"]
    for record in failed:
        print(
            f"turbo-eval: {record.k}/{record.v} at depth {record.depth} is {record.status}: {record.detail}",
            file=sys.stderr,
        )
    if failed:
        raise typer.Exit(3)


def _depths(text: str) -> tuple[int, ...]:
    from turbo_eval.errors import UsageError

    try:
        found = tuple(int(d) for d in text.split(",") if d.strip())
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise UsageError(f"--depths {text!r} is no list of depths", "write it like 0,4096,16384")
    return found


def _rows(records: Sequence[BenchRecord], known: Sequence[Record]) -> list[dict[str, object]]:
    from turbo_eval.bench.run import UNVERIFIED, quality

    rows: list[dict[str, object]] = []
    for record in records:
        found = quality(record, known)
        row = record.row()
        row["ppl"] = found.ppl if found else None
        row["kld"] = found.kld.mean if found and found.kld else None
        row["warning"] = None if found else UNVERIFIED
        rows.append(row)
    return rows


def speed_table(records: Sequence[BenchRecord], known: Sequence[Record]) -> Table:
    """Medians and ratios to f16 in the same rounds, with the quality on record beside them."""
    from rich import box
    from rich.table import Table

    from turbo_eval.bench.run import UNVERIFIED, pair_label, quality

    columns = ("depth", "K/V", "prefill t/s", "× f16", "decode t/s", "× f16", "quality")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for record in records:
        row = record.row()
        found = quality(record, known)
        if record.status != "ok":
            table.add_row(str(record.depth), pair_label(record, records), record.status, style="red")
            continue
        if found is None:
            words = f"[yellow]{UNVERIFIED}[/yellow]"
        elif found.kld:
            words = f"PPL {found.ppl:.4f}, KLD {found.kld.mean:z.5f}"
        else:
            words = f"PPL {found.ppl:.4f}"
        cells = [_number(row[n], p) for n, p in (("prefill_median", 1), ("prefill_ratio", 3))]
        cells += [_number(row[n], p) for n, p in (("decode_median", 2), ("decode_ratio", 3))]
        table.add_row(str(record.depth), pair_label(record, records), *cells, words)
    return table


def _number(value: object, places: int) -> str:
    return f"{value:.{places}f}" if isinstance(value, float) else "–"
