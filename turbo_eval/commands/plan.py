"""turbo-eval plan: what a sweep would run, how long it may take, what is on record."""

from __future__ import annotations

import typer

from turbo_eval.commands import options as o


def register(app: typer.Typer) -> None:
    app.command(
        help="""Show the cells of a sweep without running them.

          turbo-eval plan configs/full.toml
        """
    )(plan)


def plan(
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
    bin_dir: o.BinDir = None,
    results: o.Results = None,
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from turbo_eval.llama.provenance import machine
    from turbo_eval.metrics.base_logits import BaseLogits
    from turbo_eval.records.store import Store
    from turbo_eval.sweep.plan import estimate_seconds, make_plan
    from turbo_eval.util.paths import results_dir

    given = o.overrides(
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
    )
    spec = o.load_spec(config, given)
    made = make_plan(spec, o.load_build(spec.backend, bin_dir))
    store = Store(results or results_dir(), machine().id)
    known = store.all()
    status = {record.key: record.status for record in known}
    columns = ("model", "K/V", "metric", "ctx", "chunks", "anchor", "estimate", "record")
    console = Console()
    wide = console.width >= 110
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("#", *columns, *(("key",) if wide else ())):
        table.add_column(name, no_wrap=True)
    left = 0.0
    for number, job in enumerate(made.jobs, start=1):
        cell = job.cell
        have = status.get(cell.key())
        seconds = estimate_seconds(job, known, made.threads)
        left += 0 if have == "ok" else seconds
        row = [str(number), cell.model, f"{cell.k}/{cell.v}", cell.metric, str(cell.ctx)]
        row += [str(cell.chunks), cell.anchor, "" if have == "ok" else f"{seconds:.0f} s", have or "–"]
        row += [cell.key()] if wide else []
        table.add_row(*row, style="dim" if have == "ok" else None)
    console.print(table)
    to_do = sum(status.get(job.cell.key()) != "ok" for job in made.jobs)
    console.print(f"{to_do} of {len(made.jobs)} cells to run, roughly {left / 60:.1f} min.")
    bases = {}
    for job in made.jobs:
        if job.cell.metric == "kld":
            base = BaseLogits.default()
            path = base.path(job.cell, store.dir.name)
            bases[path] = (base.size_for(job.cell, job.model.gguf.n_vocab), path.exists())
    if bases:
        total = sum(size for size, _ in bases.values()) / 2**20
        have_all = all(there for _, there in bases.values())
        cap = BaseLogits.default().cap / 2**30
        state = "in the cache" if have_all else "to be computed"
        console.print(f"Base logits: {total:.0f} MiB, {state}; the cache holds at most {cap:g} GiB.")
