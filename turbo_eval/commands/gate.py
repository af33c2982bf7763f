"""turbo-eval gate: thresholds on records, for CI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.analysis.gate import run_gate, settle
from turbo_eval.analysis.staleness import moved_on
from turbo_eval.analysis.verdict import render_verdict
from turbo_eval.commands import options as o
from turbo_eval.llama.provenance import collect, machine
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import make_plan
from turbo_eval.sweep.progress import live
from turbo_eval.sweep.spec import load_gate
from turbo_eval.util.files import atomic_write
from turbo_eval.util.paths import results_dir


def register(app: typer.Typer) -> None:
    app.command(
        help="""Judge the records of this machine and build against a config's checks.

        Exit code 0: all pass; 1: a regression, each failing check says its sentence; 2: bad usage
        or config; 3: cells missing, failed or stale, sources that moved on since the build, or no
        reference. Without --until-decided nothing is run. ΔPPL is against f16/f16 of the same text and build,
        unless the config names another pair (`against = "q8_0:q8_0"`, in [sweep] or in a check).

          turbo-eval sweep configs/gates.toml && turbo-eval gate configs/gates.toml

          turbo-eval gate configs/gates.toml --backend metal --markdown verdict.md

          turbo-eval gate configs/gates.toml --until-decided --max-chunks 64
        """
    )(gate)


def gate(
    config: Annotated[Path, typer.Argument(help="A gate config, e.g. configs/gates.toml.")],
    backend: o.Backend = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write verdict and table there, for a pull request.", show_default=False),
    ] = None,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided",
            help="Add chunks to the pairs of equivalent_within and not_worse_than until each is decided; the"
            " error rate of 5 % holds at all looks together.",
        ),
    ] = False,
    max_chunks: o.MaxChunks = 128,
) -> None:
    spec = load_gate(config, backend=backend)
    build = o.load_build(spec.sweep.backend, bin_dir)
    plan = make_plan(spec.sweep, build, download=False)
    o.warn(*plan.notes)
    store = Store(results or results_dir(), machine().id)
    settled = settle(spec, build, collect(build), store, live, max_chunks) if until_decided else []
    outcome = run_gate(spec, plan, store, moved_on(build), settled)
    if markdown is not None:
        with atomic_write(markdown) as stream:
            stream.write(render_verdict(spec, outcome).encode())
    for sentence in outcome.judged:
        print(f"judged      {sentence}")
    for sentence in outcome.passed:
        print(f"pass        {sentence}")
    for sentence in outcome.incomplete:
        print(f"incomplete  {sentence}", file=sys.stderr)
    for sentence in outcome.regressions:
        print(f"FAIL        {sentence}", file=sys.stderr)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
