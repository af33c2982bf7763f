"""turbo-eval plan: what a sweep would run, how long it may take, what is on record."""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from turbo_eval.analysis.staleness import moved_on
from turbo_eval.commands import options as o
from turbo_eval.llama.provenance import machine
from turbo_eval.metrics.base_logits import BaseLogits
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan, estimate_seconds, make_plan
from turbo_eval.util.paths import results_dir


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
    against: o.Against = None,
    no_reference: o.NoReference = False,
    metrics: o.Metrics = None,
    ctx: o.Ctx = None,
    chunks: o.Chunks = None,
    ubatch: o.UBatch = None,
    anchor: o.Anchor = None,
    recent: o.Recent = None,
    first: o.First = None,
    backend: o.Backend = None,
    engine: o.EngineName = None,
    threads: o.Threads = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
) -> None:
    given = o.overrides(
        models=model,
        corpus=corpus,
        pairs=pairs,
        k=k,
        v=v,
        against=against,
        reference=False if no_reference else None,
        metrics=metrics,
        ctx=ctx,
        chunks=chunks,
        ubatch=ubatch,
        anchor=anchor,
        recent=recent,
        first=first,
        backend=backend,
        engine=engine,
        threads=threads,
    )
    spec = o.load_spec(config, given)
    made = make_plan(spec, o.load_build(spec.backend, bin_dir))
    store = Store(results or results_dir(), machine().id)
    known = store.all()
    status = {record.key: record.status for record in known}
    o.warn(*made.notes, moved_on(made.build))
    console = Console()
    seconds = {job.cell.key(): estimate_seconds(job, known, made.threads) for job in made.jobs}
    console.print(cells_table(made, status, seconds, console.width))
    left = sum(seconds[job.cell.key()] for job in made.jobs if status.get(job.cell.key()) != "ok")
    to_do = sum(status.get(job.cell.key()) != "ok" for job in made.jobs)
    console.print(f"{to_do} of {len(made.jobs)} cells to run, roughly {left / 60:.1f} min.")
    bases = {}
    for job in made.jobs:
        if job.cell.metric == "kld" and job.cell.engine == "llama-perplexity":
            base = BaseLogits.default()
            path = base.path(job.cell, store.dir.name)
            bases[path] = (base.size_for(job.cell, job.model.gguf.n_vocab), path.exists())
    if bases:
        total = sum(size for size, _ in bases.values()) / 2**20
        have_all = all(there for _, there in bases.values())
        cap = BaseLogits.default().cap / 2**30
        state = "in the cache" if have_all else "to be computed"
        console.print(f"Base logits: {total:.0f} MiB, {state}; the cache holds at most {cap:g} GiB.")


def cells_table(plan: Plan, status: Mapping[str, str], seconds: Mapping[str, float], width: int) -> Group:
    """The cells with estimate and record. What doesn't fit into `width` columns is said once for all cells
    where it is the same for all, else folded."""

    rows = []
    for number, job in enumerate(plan.jobs, start=1):
        cell = job.cell
        have = status.get(cell.key())
        estimate = "" if have == "ok" else f"{seconds[cell.key()]:.0f} s"
        pair = cell.named().replace(":", "/", 1)
        row = {"#": str(number), "model": cell.model, "K/V": pair, "metric": cell.metric}
        row |= {"ctx": str(cell.ctx), "chunks": str(cell.chunks), "anchor": cell.anchor}
        rows.append(row | {"estimate": estimate, "record": have or "–", "key": cell.key()})
    shown, said = list(rows[0]), []
    if width < 110:
        shown.remove("key")
    for name in ("model", "chunks", "ctx", "anchor", "metric"):
        natural = sum(2 + max(len(text) for text in (column, *(r[column] for r in rows))) for column in shown)
        if natural > width and len({row[name] for row in rows}) == 1:
            shown.remove(name)
            said.append(f"{name} {rows[0][name]}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in shown:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in shown), style="dim" if row["record"] == "ok" else None)
    return Group(*([Text(", ".join(said))] if said else []), table)
