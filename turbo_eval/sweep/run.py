"""Run a plan: skip what is on record, measure the rest, write each record as it comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from turbo_eval.errors import TurboEvalError
from turbo_eval.metrics import metric, references
from turbo_eval.metrics.base import Bench, Job, OnProgress
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.records.reference import candidates, is_exact, serves
from turbo_eval.records.store import Store
from turbo_eval.sweep.one_pass import measure_together, together
from turbo_eval.sweep.plan import Plan


class Reporter(Protocol):
    """Hears what a sweep does. Numbers are 0-based positions in the plan.

    `ppl` is the perplexity of the first `chunk` chunks, `base` that of f16/f16 over the same.
    """

    def begin(self, number: int, job: Job) -> None: ...

    def progress(
        self, number: int, chunk: int, total: int | None, ppl: float | None, base: float | None = None
    ) -> None: ...

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
    plan: Plan,
    provenance: Provenance,
    store: Store,
    reporter: Reporter,
    *,
    fresh: bool = False,
    sequential: bool = False,
) -> SweepResult:
    """Run every cell that has no record (all of them if `fresh`).

    A failed cell is recorded and does not stop the rest; on the next run it is tried again. A cell
    that another sweep on the same folder is running is put last and then waited for.

    Args:
        sequential: the number of chunks was decided by looking at figures; the records say so.

    Raises:
        InterruptedSweepError: Ctrl-C.
        EnvironmentProblem: disk full, tool missing: nothing further could succeed.
    """
    bench = Bench(plan.build, provenance, store, plan.threads, plan.spec.timeout)
    sweep = _Sweep(plan.jobs, bench, reporter, fresh, sequential)
    try:
        sweep.run()
    except KeyboardInterrupt:
        raise InterruptedSweepError(
            f"interrupted; {len(sweep.done)} of {len(plan.jobs)} cells are on record",
            "run the same command again to go on",
        ) from None
    return SweepResult([sweep.done[n] for n in sorted(sweep.done)], sweep.reused)


class _Sweep:
    """Goes through the plan; `done` holds records by number."""

    def __init__(
        self, jobs: Sequence[Job], bench: Bench, reporter: Reporter, fresh: bool, sequential: bool
    ) -> None:
        self.jobs, self.bench, self.reporter = jobs, bench, reporter
        self.fresh, self.sequential = fresh, sequential
        self.done: dict[int, Record] = {}
        self.reused = 0

    def run(self) -> None:
        queue = deque(together(self.jobs))
        deferred: set[int] = set()
        while queue:
            numbers = queue.popleft()
            waited = numbers[0] in deferred
            if waited:
                self.reporter.waiting(numbers[0], self.jobs[numbers[0]])
            with ExitStack() as locks:
                missing = []
                for number in numbers:
                    if not locks.enter_context(self.bench.store.lock(self.jobs[number].cell, wait=waited)):
                        deferred.add(number)
                        queue.append([number])  # alone: nothing is held while another sweep is waited for
                    elif not self._recall(number, waited):
                        missing.append(number)
                self._measure(missing)

    def _recall(self, number: int, waited: bool) -> bool:
        known = None if self.fresh and not waited else self.bench.store.load(self.jobs[number].cell)
        if known is None or not known.ok:
            return False
        self.reused += 1
        self.done[number] = known
        self.reporter.end(number, known, reused=True)
        return True

    def _measure(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        number_of = {id(self.jobs[number]): number for number in numbers}
        for number in numbers:
            self.reporter.begin(number, self.jobs[number])
        jobs = [self.jobs[number] for number in numbers]
        if jobs[0].cell.engine == "llama-perplexity":
            self._end(numbers[0], _measure(jobs[0], self.bench, self._follow(numbers[0])))
            return

        def on_progress(
            job: Job, chunk: int, total: int | None, ppl: float | None, base: float | None = None
        ) -> None:
            self.reporter.progress(number_of[id(job)], chunk, total, ppl, base)

        for job, record in measure_together(jobs, self.bench, on_progress, sequential=self.sequential):
            self._end(number_of[id(job)], record)

    def _follow(self, number: int) -> OnProgress:
        """Of a run of llama-perplexity, beside the reference that is on record."""
        cell = self.jobs[number].cell
        places = () if is_exact(cell) else candidates(cell)
        known = next((r for c in places if (r := self.bench.store.load(c)) and serves(r)), None)
        running = known.running_ppl if known is not None else ()

        def follow(chunk: int, total: int | None, ppl: float | None) -> None:
            base = running[chunk - 1] if 0 < chunk <= len(running) else None
            self.reporter.progress(number, chunk, total, ppl, base)

        return follow

    def _end(self, number: int, record: Record) -> None:
        self.bench.store.write(record)
        self.done[number] = record
        self.reporter.end(number, record, reused=False)


def _measure(job: Job, bench: Bench, on_progress: OnProgress) -> Record:
    """By the job's metric, with what it is compared with as far as it is on record."""
    found = (bench.store.load(cell) for cell in references(job.cell))
    known = [record for record in found if record is not None and record.ok]
    return metric(job.cell.metric).measure(job, bench, on_progress, known)
