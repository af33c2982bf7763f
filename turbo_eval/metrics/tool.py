"""llama-perplexity, run for a cell and judged: what its metrics share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbo_eval.llama import output
from turbo_eval.metrics import judge
from turbo_eval.metrics.base import Bench, OnProgress
from turbo_eval.metrics.base_logits import RunExact
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Effective, Record, Run, finite
from turbo_eval.util.process import Outcome, child_environment, relevant_environment, run


def execute(
    cell: Cell, argv: list[str], bench: Bench, log: Path, on_progress: OnProgress
) -> tuple[Outcome, Run]:
    """Run llama-perplexity, following its progress; hopeless runs are ended early.

    Hopeless: what runs is not what was asked for, or the running perplexity is no number any more.
    llama.cpp without our patches can lose the last lines of its log as it exits, and with them the
    figures: a run that ended well but said none is run once more.
    """
    env, removed = child_environment()
    outcome = _follow(cell, argv, env, bench, log, on_progress)
    if outcome.returncode == 0 and not outcome.stopped and output.lost_its_end(outcome.text):
        outcome = _follow(cell, argv, env, bench, log, on_progress)
    return outcome, run_of(outcome, argv, removed, bench, log)


def run_of(outcome: Outcome, argv: list[str], removed: tuple[str, ...], bench: Bench, log: Path) -> Run:
    """How a process went, for its record."""
    return Run(
        argv=tuple(argv),
        env=relevant_environment(),
        env_removed=removed,
        started=outcome.started,
        seconds=outcome.seconds,
        cpu_seconds=outcome.cpu_seconds,
        peak_mib=outcome.peak_mib,
        returncode=outcome.returncode,
        threads=bench.threads,
        log=str(log.relative_to(bench.store.root)) if log.is_relative_to(bench.store.root) else log.name,
    )


def _follow(
    cell: Cell, argv: list[str], env: dict[str, str], bench: Bench, log: Path, on_progress: OnProgress
) -> Outcome:
    scanner = output.ProgressScanner()
    seen: list[str] = []

    def follow(text: str) -> bool:
        if scanner.total is None:
            seen.append(text)
        if not scanner.feed(text):
            return False
        on_progress(scanner.chunk, scanner.total, scanner.ppl)
        if seen:  # the start-up lines are complete
            state = output.parse_effective("".join(seen))
            seen.clear()
            return judge.judge_state(cell, state) is not None
        return scanner.ppl is not None and not finite(scanner.ppl)

    return run(argv, log=log, env=env, timeout=bench.timeout, on_text=follow)


def judged(
    cell: Cell, outcome: Outcome, timeout: float | None
) -> tuple[output.PplText, Effective, judge.Fault | None]:
    """Text → what it says and what is wrong: process, then state, then numbers; the first fault counts."""
    result = output.parse_ppl(outcome.text)
    effective = output.parse_effective(outcome.text)
    fault = (
        judge.judge_process(outcome, timeout)
        or judge.judge_state(cell, effective)
        or judge.judge_numbers(cell, outcome.text, result)
    )
    return result, effective, fault


def conclude(cell: Cell, outcome: Outcome, run_info: Run, bench: Bench) -> Record:
    """The record of a plain run."""
    result, effective, fault = judged(cell, outcome, bench.timeout)
    return record_of(cell, run_info, bench, effective, fault, result)


def exact_runner(bench: Bench, on_progress: OnProgress) -> RunExact:
    """Measures the reference's cell for its base logits, and puts the plain command line on record."""

    def run_exact(exact: Cell, argv: list[str], shown: list[str]) -> Record:
        outcome, info = execute(exact, argv, bench, bench.store.log_path(exact), on_progress)
        return conclude(exact, outcome, info.model_copy(update={"argv": tuple(shown)}), bench)

    return run_exact


def record_of(
    cell: Cell,
    run_info: Run,
    bench: Bench,
    effective: Effective,
    fault: judge.Fault | None,
    result: output.PplText | None = None,
    **figures: Any,
) -> Record:
    """A record: with a fault without numbers, else with those of `result`.

    Args:
        figures: further fields; those given with a fault say what went wrong.
    """
    numbers: dict[str, Any] = {}
    if fault is None and result is not None:
        numbers = {"ppl": result.ppl, "ppl_err": result.ppl_err, "running_ppl": result.running}
    return Record(
        key=cell.key(),
        cell=cell,
        status=fault[0] if fault else "ok",
        detail=fault[1] if fault else "",
        effective=effective,
        run=run_info,
        provenance=bench.provenance,
        **numbers,
        **figures,
    )
