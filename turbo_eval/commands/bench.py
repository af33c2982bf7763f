"""turbo-eval bench: speed over depth, with the quality of the same pair beside it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from turbo_eval.analysis.figures import save, speed_figure
from turbo_eval.analysis.staleness import moved_on
from turbo_eval.anchor.profile import fitting_profiles, read_profiles, windowed_profiles
from turbo_eval.bench.run import UNVERIFIED, BenchPlan, pair_label, quality, quality_words, run_bench
from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import CACHE_TYPES, parse_pair
from turbo_eval.inputs.models import resolve_model
from turbo_eval.inputs.synthetic import parse_shape, synthetic_model
from turbo_eval.llama.provenance import collect
from turbo_eval.llama.tool import capabilities, check_types, check_window
from turbo_eval.records.record import Record
from turbo_eval.records.speed import BenchRecord
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import beyond_training, check_anchors, check_blocks
from turbo_eval.util import numbers as n
from turbo_eval.util.paths import results_dir

PAIRS = ",".join(
    f"{t.name}:{t.name}" for t in CACHE_TYPES.values() if t.common and (t.codebook or t.beside_ours)
)


def register(app: typer.Typer) -> None:
    app.command(
        help="""Measure prefill and decode speed over depth, interleaved with f16 of the same build.

        Exit code 0: every pair ran; 3: some did not.

          turbo-eval bench --model qwen2.5-coder-0.5b --pairs turbo3:turbo3,q8_0:turbo3 --depths 0,4096

          turbo-eval bench --synthetic 8b --backend cuda --depths 0,16384,65536 --plot speed.svg
        """
    )(bench)


Prompt = Annotated[
    int,
    typer.Option(
        parser=n.option("--prompt", n.DEPTH), metavar="N", help="Tokens of the prefill test; 0: none."
    ),
]
Gen = Annotated[
    int,
    typer.Option(parser=n.option("--gen", n.DEPTH), metavar="N", help="Tokens of the decode test; 0: none."),
]
Reps = Annotated[
    int, typer.Option(parser=n.option("--reps", n.COUNT), metavar="N", help="Interleaved rounds.")
]


def bench(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model by name or path.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Random weights of a shape: 8b, 1b, tiny or layers=…,heads=…")
    ] = None,
    pairs: Annotated[str, typer.Option("--pairs", "-p", help="K:V,K:V,…")] = PAIRS,
    profile: o.Profiles = None,
    depths: Annotated[str, typer.Option(help="Tokens in the cache before the test.")] = "0,4096",
    prompt: Prompt = 256,
    gen: Gen = 32,
    reps: Reps = 3,
    backend: o.Backend = None,
    threads: o.Threads = None,
    anchor: o.Anchor = None,
    recent: o.Recent = None,
    first: o.First = None,
    timeout: o.Timeout = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: .svg or .png.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
) -> None:
    if (model is None) == (synthetic is None):
        raise UsageError("name a model or a synthetic shape", "give --model or --synthetic, not both")
    if prompt + gen == 0:
        raise UsageError("there is nothing to measure", "give --prompt or --gen above 0")
    wanted = tuple(parse_pair(p) for p in pairs.split(",") if p.strip())
    build = o.load_build(backend or "cpu", bin_dir)
    check_types(build, wanted)
    file = resolve_model(str(synthetic_model(parse_shape(synthetic))) if synthetic else model or "")
    for pair in wanted:
        check_blocks(file, pair)
    files = read_profiles([str(p) for p in profile or ()], build)
    fit = fitting_profiles(files, file)
    for other in (f for f in files if f not in fit):
        raise UsageError(f"profile {other.path} is for another model than {file.name}", "name its model")
    places = tuple(int(depth) for depth in n.several("--depths", depths, n.DEPTH))
    o.warn(beyond_training(file, max(places) + prompt + gen), moved_on(build))
    anchors = check_anchors(tuple(o.split(anchor) or ()) or None, build)
    sizes = tuple(n.tokens_or_auto("--recent", recent or n.AUTO))
    begin = o.one_window("--first", first or n.AUTO)
    check_window(sizes, begin, build)
    plan = BenchPlan(
        pairs=wanted,
        depths=places,
        prompt=prompt,
        gen=gen,
        reps=reps,
        threads=threads or os.cpu_count() or 1,
        backend=backend or "cpu",
        anchors=anchors if capabilities(build).kv_anchor else (None,),
        timeout=timeout,
        windowed=capabilities(build).kv_window,
        recent=sizes,
        first=begin,
        profiles=tuple(windowed_profiles(sizes, begin, fit)),
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
    if not _show(records, store.all(), as_json, plot):
        raise typer.Exit(3)


def _show(records: Sequence[BenchRecord], known: Sequence[Record], as_json: bool, plot: Path | None) -> bool:
    """Print and draw the speeds and name what failed; whether nothing did."""
    if as_json:
        print(json.dumps(_rows(records, known), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        Console().print(speed_table(records, known))
    if plot is not None:
        save(speed_figure(records), plot)
    failed = [r for r in records if r.status != "ok"]
    for record in failed:
        print(
            f"turbo-eval: {record.k}/{record.v} at depth {record.depth} is {record.status}: {record.detail}",
            file=sys.stderr,
        )
    return not failed


def _rows(records: Sequence[BenchRecord], known: Sequence[Record]) -> list[dict[str, object]]:
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

    columns = ("depth", "K/V", "prefill t/s", "× f16", "decode t/s", "× f16", "quality")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for record in records:
        row = record.row()
        found = quality(record, known)
        if record.status != "ok":
            table.add_row(str(record.depth), pair_label(record, records), record.status, style="red")
            continue
        words = quality_words(found) if found else f"[yellow]{UNVERIFIED}[/yellow]"
        cells = [_number(row[n], p) for n, p in (("prefill_median", 1), ("prefill_ratio", 3))]
        cells += [_number(row[n], p) for n, p in (("decode_median", 2), ("decode_ratio", 3))]
        table.add_row(str(record.depth), pair_label(record, records), *cells, words)
    return table


def _number(value: object, places: int) -> str:
    return f"{value:.{places}f}" if isinstance(value, float) else "–"
