"""turbo-eval bench: speed over depth, of several sequences, of drafts; with the quality of the same cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table

from turbo_eval.analysis.figures import save
from turbo_eval.analysis.speed import lines
from turbo_eval.analysis.speed.figure import speed_figure
from turbo_eval.analysis.staleness import moved_on
from turbo_eval.anchor.profile import fitting_profiles, read_profiles, windowed_profiles
from turbo_eval.bench.plan import BenchPlan
from turbo_eval.bench.quality import UNVERIFIED, quality
from turbo_eval.bench.run import Benchmark
from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import CACHE_TYPES, parse_pair
from turbo_eval.inputs.models import resolve_model
from turbo_eval.inputs.synthetic import PRESETS, parse_shape, synthetic_model
from turbo_eval.llama.provenance import collect
from turbo_eval.llama.tool import capabilities, check_types, check_window
from turbo_eval.records.record import Record
from turbo_eval.records.speed import WORKLOADS, BenchRecord
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import beyond_training, check_anchors, check_blocks
from turbo_eval.util import numbers as n
from turbo_eval.util.paths import results_dir

PAIRS = ",".join(
    f"{t.name}:{t.name}" for t in CACHE_TYPES.values() if t.common and (t.codebook or t.beside_ours)
)


def register(app: typer.Typer) -> None:
    app.command(
        help="""Measure speed, interleaved with f16 of the same build: over depth, of sequences, of drafts.

        With --parallel and --draft it is what servers and speculative decoding pay. What is on record
        with as many rounds is kept. Exit code 0: every pair ran; 3: some did not.

          turbo-eval bench --model qwen2.5-coder-0.5b --pairs turbo3:turbo3,q8_0:turbo3 --depths 0,4096

          turbo-eval bench --synthetic 8b --backend cuda --depths 0,16384,65536 --plot speed.svg

          turbo-eval bench --model qwen2.5-coder-0.5b --parallel 1,8,32 --prompt 512 --gen 64

          turbo-eval bench --model qwen2.5-coder-0.5b --draft 2,8,32 --depths 4096
        """
    )(bench)


Prompt = Annotated[
    int,
    typer.Option(
        parser=n.option("--prompt", n.DEPTH),
        metavar="N",
        help="Tokens of the prefill test, or of each prompt of --parallel; 0: none.",
    ),
]
Gen = Annotated[
    int,
    typer.Option(
        parser=n.option("--gen", n.DEPTH),
        metavar="N",
        help="Tokens of the decode test, or new tokens of each sequence of --parallel; 0: none.",
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N…]",
        help="Not over depth, but so many sequences at once, as a server has, e.g. 1,8,32.",
        show_default=False,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N…]",
        help="Not prefill and decode, but so many new tokens a step, as to check a draft, e.g. 2,8,32.",
        show_default=False,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is on record.")]
Reps = Annotated[
    int, typer.Option(parser=n.option("--reps", n.COUNT), metavar="N", help="Interleaved rounds.")
]


def bench(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model by name or path.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(help=f"Random weights of a shape: {', '.join(PRESETS)} or layers=…,heads=…")
    ] = None,
    pairs: Annotated[str, typer.Option("--pairs", "-p", help="K:V,K:V,…")] = PAIRS,
    profile: o.Profiles = None,
    depths: Annotated[str, typer.Option(help="Tokens in the cache before the test.")] = "0,4096",
    prompt: Prompt = 256,
    gen: Gen = 32,
    parallel: Parallel = None,
    draft: Draft = None,
    reps: Reps = 3,
    backend: o.Backend = None,
    threads: o.Threads = None,
    anchor: o.Anchor = None,
    recent: o.Recent = None,
    first: o.First = None,
    timeout: o.Timeout = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    fresh: Fresh = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: .svg or .png.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
) -> None:
    if (model is None) == (synthetic is None):
        raise UsageError("name a model or a synthetic shape", "give --model or --synthetic, not both")
    sequences, drafts = _sizes(parallel, draft, prompt, gen)
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
    anchors = check_anchors(tuple(o.split(anchor) or ()) or None, build)
    sizes = tuple(n.tokens_or_auto("--recent", recent or n.AUTO))
    begin = o.one_window("--first", first or n.AUTO)
    check_window(sizes, begin, build)
    plan = BenchPlan(
        pairs=wanted,
        depths=tuple(int(depth) for depth in n.several("--depths", depths, n.DEPTH)),
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
        parallel=sequences,
        draft=drafts,
    )
    o.warn(beyond_training(file, plan.longest()), moved_on(build))
    provenance = collect(build)
    store = Store(results or results_dir(), provenance.machine.id)
    work = Benchmark(plan, file, build, provenance, store.dir / "bench", fresh=fresh)
    schedule = work.schedule()
    _say(f"plan: {schedule}")
    records = work.run(schedule, _say)
    if not _show(records, store.all(), as_json, plot):
        raise typer.Exit(3)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sizes(
    parallel: str | None, draft: str | None, prompt: int, gen: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of --parallel and --draft, and whether there is something to measure with them."""
    sequences = n.several("--parallel", parallel, n.SEQUENCES) if parallel is not None else []
    drafts = n.several("--draft", draft, n.DRAFT) if draft is not None else []
    if sequences and not (prompt and gen):
        raise UsageError(
            "--parallel measures prompts and new tokens in one run", "give --prompt and --gen above 0"
        )
    if not drafts and prompt + gen == 0:
        raise UsageError("there is nothing to measure", "give --prompt or --gen above 0")
    return tuple(map(int, sequences)), tuple(map(int, drafts))


def _show(records: Sequence[BenchRecord], known: Sequence[Record], as_json: bool, plot: Path | None) -> bool:
    """Print and draw the speeds and name what failed; whether nothing did."""
    if as_json:
        print(json.dumps(_rows(records, known), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        for workload in WORKLOADS:
            if own := [r for r in records if r.workload == workload]:
                Console().print(speed_table(own, known))
    if plot is not None:
        save(speed_figure(records), plot)
    failed = [r for r in records if r.status != "ok"]
    for record in failed:
        print(
            f"turbo-eval: {record.k}/{record.v} {_at(record)} is {record.status}: {record.detail}",
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


def _at(record: BenchRecord) -> str:
    """ "at depth 4096", "with 8 sequences", "with a draft of 8 at depth 4096"."""
    if record.workload == "parallel":
        return f"with {record.size} sequence{'s' if record.size > 1 else ''}"
    return (
        f"with a draft of {record.size} " if record.workload == "draft" else ""
    ) + f"at depth {record.depth}"


def speed_table(records: Sequence[BenchRecord], known: Sequence[Record]) -> Group:
    """Medians and ratios to f16 in the same rounds, with the quality on record, once where it is the same for
    all. All records are of one workload."""
    rows = [lines.line(record, records, known) for record in records]
    qualities = {row[-1] for row, r in zip(rows, records, strict=True) if r.status == "ok"}
    said = next(iter(qualities)) if len(qualities) == 1 else ""
    table = Table(box=box.SIMPLE_HEAD)
    for column in lines.COLUMNS[records[0].workload]:
        wraps = column in ("K/V", "quality")
        table.add_column(column, no_wrap=not wraps, min_width=13 if wraps else None)
    for record, row in zip(records, rows, strict=True):
        words = "" if row[-1] == said else row[-1]
        table.add_row(*row[:-1], words, style="red" if record.status != "ok" else None)
    if all(row[-1] == said for row in rows):
        table.columns.pop()
    return Group(table, *([f"  quality: [yellow]{said}[/yellow]"] if said else []))
