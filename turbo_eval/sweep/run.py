"""Run a plan: skip what is on record, measure the rest, write each record as it comes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from turbo_eval.errors import TurboEvalError
from turbo_eval.metrics import metric, references
from turbo_eval.metrics.base import Bench, Job, OnProgress
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan


class Reporter(Protocol):
    """Hears what a sweep does. Numbers are 0-based positions in the plan."""

    def begin(self, number: int, job: Job) -> None: ...

    def progress(self, number: int, chunk: int, total: int | None, ppl: float | None) -> None: ...

    def end(self, number: int, record: Record, *, reused: bool) -> None: ...

    def waiting(self, number: int, job: Job) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class SweepResult:
    """Records in the plan's order; `reused` counts those that were on record already."""

    records: list[Record] = field(default_factory=list)
    reused: int = 0


class InterruptedSweepError(TurboEvalError):
    """Ctrl-C: the running cell was abandoned, finished ones are on record."""

    exit_code = 130


def run_sweep(
    plan: Plan, provenance: Provenance, store: Store, reporter: Reporter, *, fresh: bool = False
) -> SweepResult:
    """Run every cell that has no record (all of them if `fresh`).

    A failed cell is recorded and does not stop the rest; on the next run it is tried again. A cell
    that another sweep on the same folder is running is put last and then waited for.

    Raises:
        InterruptedSweepError: Ctrl-C.
        EnvironmentProblem: disk full, tool missing: nothing further could succeed.
    """
    bench = Bench(plan.build, provenance, store, plan.threads, plan.spec.timeout)
    result = SweepResult()
    done: dict[int, Record] = {}
    queue = deque(enumerate(plan.jobs))
    deferred: set[int] = set()
    try:
        while queue:
            number, job = queue.popleft()
            waited = number in deferred
            if waited:
                reporter.waiting(number, job)
            with store.lock(job.cell, wait=waited) as held:
                if not held:
                    deferred.add(number)
                    queue.append((number, job))
                    continue
                known = None if fresh and not waited else store.load(job.cell)
                if known is not None and known.ok:
                    result.reused += 1
                    done[number] = known
                    reporter.end(number, known, reused=True)
                    continue
                reporter.begin(number, job)
                record = _measure(job, bench, partial(reporter.progress, number))
                store.write(record)
                done[number] = record
                reporter.end(number, record, reused=False)
    except KeyboardInterrupt:
        raise InterruptedSweepError(
            f"interrupted; {len(done)} of {len(plan.jobs)} cells are on record",
            "run the same command again to go on",
        ) from None
    result.records = [done[n] for n in sorted(done)]
    return result


def _measure(job: Job, bench: Bench, on_progress: OnProgress) -> Record:
    """By the job's metric, with what it is compared with as far as it is on record."""
    found = (bench.store.load(cell) for cell in references(job.cell))
    known = [record for record in found if record is not None and record.ok]
    return metric(job.cell.metric).measure(job, bench, on_progress, known)
