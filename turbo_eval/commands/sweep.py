"""turbo-eval sweep: run a plan with live progress and end with the table."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from turbo_eval.analysis.picture.points import front
from turbo_eval.analysis.picture.terminal import bars
from turbo_eval.analysis.staleness import moved_on
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.analysis.table import json_rows, render_rich
from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import collect
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.reference import References
from turbo_eval.records.store import Store
from turbo_eval.scale import require_distributed
from turbo_eval.scale.client.cluster import Cluster
from turbo_eval.scale.client.executor import Patience, run_on_cluster
from turbo_eval.scale.client.pool import pool
from turbo_eval.scale.target import Target, TlsFiles, parse_target, security
from turbo_eval.sweep.plan import Plan, make_plan
from turbo_eval.sweep.progress import live
from turbo_eval.sweep.run import Reporter, SweepResult, run_sweep
from turbo_eval.sweep.spec import SweepSpec
from turbo_eval.sweep.until import run_until_decided, saved
from turbo_eval.util.paths import results_dir
from turbo_eval.util.process import seconds_in_children


def register(app: typer.Typer) -> None:
    app.command(
        help="""Measure K/V cache-type pairs and write one record a cell.

        Cells on record are not run again; failed ones are. ΔPPL is against f16/f16 of the same text and
        build, which is measured too if it is not asked for; --against names another pair. Exit code 0: every
        cell is ok;
        3: some cell failed (its row says how); 2: bad input; 4: build or disk; 130: Ctrl-C.

          turbo-eval sweep configs/demo.toml

          turbo-eval sweep --model my.gguf --corpus my.txt --pairs f16:f16,q8_0:turbo3 --chunks 20

          turbo-eval sweep configs/issue-27.toml --model qwen2.5-coder-1.5b --chunks 4 --json

          turbo-eval sweep configs/demo.toml --until-decided 0.5 --max-chunks 64

          turbo-eval sweep configs/full.toml --scheduler scheduler.json
        """
    )(sweep)


def sweep(
    config: o.Config = None,
    model: o.Model = None,
    corpus: o.Corpus = None,
    pairs: o.Pairs = None,
    k: o.KTypes = None,
    v: o.VTypes = None,
    profile: o.Profiles = None,
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
    timeout: o.Timeout = None,
    until_decided: o.UntilDecided = None,
    max_chunks: o.MaxChunks = 128,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    scheduler: o.Scheduler = None,
    jobs: o.Jobs = None,
    retries: o.Retries = 2,
    patience: o.Patience = 60.0,
    tls_ca: o.TlsCa = None,
    tls_cert: o.TlsCert = None,
    tls_key: o.TlsKey = None,
    insecure: o.Insecure = False,
    fresh: o.Fresh = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON, nothing else.")] = False,
) -> None:
    target = parse_target(scheduler, jobs)
    spec = o.load_spec(
        config,
        o.overrides(
            models=model,
            corpus=corpus,
            pairs=pairs,
            k=k,
            v=v,
            profiles=[str(p) for p in profile or ()],
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
            timeout=timeout,
        ),
    )
    if target.kind != "local":  # a worker measures a cell at a time
        spec = spec.model_copy(update={"engine": "llama-perplexity"})
    build = o.load_build_to_plan(spec.backend, bin_dir, remote=target.kind == "remote")
    if until_decided is not None:
        ok = _until(spec, build, results or results_dir(), target, until_decided, max_chunks, fresh, as_json)
        raise typer.Exit(0 if ok else 3)
    plan = make_plan(spec, build)
    o.warn(*plan.notes, moved_on(build) if target.kind == "local" else "")
    provenance, root = collect(build), results or results_dir()
    with live(plan) as reporter:
        if target.kind == "local":
            result = _here(plan, provenance, root, reporter, fresh)
        else:
            tls = TlsFiles(tls_ca, tls_cert, tls_key)
            result = _spread(
                plan, provenance, root, reporter, fresh, target, bin_dir, tls, insecure, retries, patience
            )
    if not _show(result, plan, root, provenance.machine.id, as_json):
        raise typer.Exit(3)


def _until(
    spec: SweepSpec,
    build: Build,
    root: Path,
    target: Target,
    margin: float,
    most: int,
    fresh: bool,
    as_json: bool,
) -> bool:
    """Look, add chunks, look again; ends with a line for each pair."""
    if target.kind != "local":
        raise UsageError("--until-decided runs in this process", "leave --jobs and --scheduler out")
    o.warn(moved_on(build))
    provenance = collect(build)
    store = Store(root, provenance.machine.id)
    result = run_until_decided(spec, build, provenance, store, live, margin=margin, most=most, fresh=fresh)
    last = {one.record.key: one.record for one in result.judged.values()}
    shown = replace(result.sweep, records=list(last.values()))
    ok = _show(shown, make_plan(spec, build), root, provenance.machine.id, as_json)
    if not as_json:
        for one in result.judged.values():
            print(one)
    print(f"{saved(result, most)}; each verdict is wrong in 5 % of cases at most", file=sys.stderr)
    return ok


def _show(result: SweepResult, plan: Plan, root: Path, machine: str, as_json: bool) -> bool:
    """Print the table and a line for each failed cell; whether there is none."""

    store = Store(root, machine)
    references = References.in_store(store, plan.spec.against, wanted=plan.spec.reference)
    rows = summarize(result.records, references=references)
    if as_json:
        by_key: dict[str, dict[str, Any]] = {r["key"]: r for r in json_rows(rows)}
        data = [by_key[record.key] for record in result.records]
        print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        console = Console()
        for _, group in by_setting(rows):
            console.print(render_rich(group, console.width))
            drawn = front(group) if console.is_terminal else None
            if drawn is not None and len(drawn.points) > 1:
                console.print(bars(drawn), "")
    failed = [r for r in result.records if not r.ok]
    for record in failed:
        before = store.load(record.cell)
        kept = "; the number of before is kept" if before is not None and before.ok else ""
        print(
            f"turbo-eval: {record.cell.model} {record.cell.pair()} {record.cell.metric} is"
            f" {record.status}: {record.detail}; log: {root / record.run.log}{kept}",
            file=sys.stderr,
        )
    return not failed


def _here(plan: Plan, provenance: Provenance, root: Path, reporter: Reporter, fresh: bool) -> SweepResult:
    """One cell after the other, in this process."""

    store = Store(root, provenance.machine.id)
    began, before = time.monotonic(), seconds_in_children()
    result = run_sweep(plan, provenance, store, reporter, fresh=fresh)
    llama = seconds_in_children() - before
    own = time.monotonic() - began - llama
    ran = len(result.records) - result.reused
    print(
        f"{ran} cells run, {result.reused} on record; {llama:.1f} s in llama.cpp, {own:.1f} s here",
        file=sys.stderr,
    )
    return result


def _spread(
    plan: Plan,
    provenance: Provenance,
    root: Path,
    reporter: Reporter,
    fresh: bool,
    target: Target,
    bin_dir: Path | None,
    tls: TlsFiles,
    insecure: bool,
    retries: int,
    patience: float,
) -> SweepResult:
    """On the workers of a scheduler, which for local:N is started here."""

    require_distributed()

    began = time.monotonic()
    with ExitStack() as stack:
        if target.kind == "pool":
            threads = plan.spec.threads
            address = stack.enter_context(pool(target.jobs, plan.spec.backend, threads, bin_dir))
            secured = None
        else:
            address, secured = target.address, security(target.address, tls, insecure=insecure)
        cluster = stack.enter_context(Cluster(address, secured))
        allowed = Patience(patience, retries)
        result = run_on_cluster(plan, provenance, root, reporter, cluster, fresh=fresh, patience=allowed)
    ran = len(result.records) - result.reused
    print(f"{ran} cells run, {result.reused} on record; {time.monotonic() - began:.1f} s", file=sys.stderr)
    return result
