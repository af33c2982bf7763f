"""turbo-eval sweep: run a plan with live progress and end with the table."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from turbo_eval.commands import options as o


def register(app: typer.Typer) -> None:
    app.command(
        help="""Measure K/V cache-type pairs and write one record a cell.

        Cells on record are not run again; failed ones are. Exit code 0: every cell is ok;
        3: some cell failed (its row says how); 2: bad input; 4: build or disk; 130: Ctrl-C.

          turbo-eval sweep configs/demo.toml

          turbo-eval sweep --model my.gguf --corpus my.txt --pairs f16:f16,q8_0:turbo3 --chunks 20

          turbo-eval sweep configs/issue-27.toml --model qwen2.5-coder-1.5b --chunks 4 --json
        """
    )(sweep)


def sweep(
    config: o.Config = None,
    model: o.Model = None,
    corpus: o.Corpus = None,
    pairs: o.Pairs = None,
    k: o.KTypes = None,
    v: o.VTypes = None,
    baseline: o.Baseline = None,
    metrics: o.Metrics = None,
    ctx: o.Ctx = None,
    chunks: o.Chunks = None,
    ubatch: o.UBatch = None,
    anchor: o.Anchor = None,
    backend: o.Backend = None,
    threads: o.Threads = None,
    timeout: o.Timeout = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every cell, on record or not.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
) -> None:
    from turbo_eval.paths import results_dir
    from turbo_eval.plan import make_plan
    from turbo_eval.progress import live
    from turbo_eval.provenance import collect
    from turbo_eval.runner import seconds_in_children
    from turbo_eval.store import Store
    from turbo_eval.sweep import run_sweep
    from turbo_eval.table import by_setting, json_rows, render_rich, summarize

    spec = o.load_spec(
        config,
        o.overrides(
            models=model,
            corpus=corpus,
            pairs=pairs,
            k=k,
            v=v,
            baseline=baseline,
            metrics=metrics,
            ctx=ctx,
            chunks=chunks,
            ubatch=ubatch,
            anchor=anchor,
            backend=backend,
            threads=threads,
            timeout=timeout,
        ),
    )
    build = o.load_build(spec.backend, bin_dir)
    plan = make_plan(spec, build)
    provenance = collect(build)
    store = Store(results or results_dir(), provenance.machine.id)
    began, before = time.monotonic(), seconds_in_children()
    with live(plan) as reporter:
        result = run_sweep(plan, provenance, store, reporter, fresh=fresh)
    llama = seconds_in_children() - before
    own = time.monotonic() - began - llama
    ran = len(result.records) - result.reused
    print(
        f"{ran} cells run, {result.reused} on record; {llama:.1f} s in llama.cpp, {own:.1f} s here",
        file=sys.stderr,
    )
    rows = summarize(result.records, spec.baseline)
    if as_json:
        by_key: dict[str, dict[str, Any]] = {r["key"]: r for r in json_rows(rows)}
        data = [by_key[record.key] for record in result.records]
        print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        console = Console()
        for _, group in by_setting(rows):
            console.print(render_rich(group, console.width))
    failed = [r for r in result.records if not r.ok]
    for record in failed:
        print(
            f"turbo-eval: {record.cell.model} {record.cell.pair()} {record.cell.metric} is"
            f" {record.status}: {record.detail}; log: {store.root / record.run.log}",
            file=sys.stderr,
        )
    if failed:
        raise typer.Exit(3)
