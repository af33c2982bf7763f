"""Live progress of a sweep, on stderr so that stdout stays data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from turbo_eval.metrics import METRICS, metric
from turbo_eval.metrics.base import Job
from turbo_eval.records.record import Record
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.run import Reporter
from turbo_eval.sweep.running import RunningDelta, TimeLeft, words_of_delta, words_of_time


@contextmanager
def live(plan: Plan) -> Iterator[Reporter]:
    """A rich display on a terminal, one line a cell elsewhere."""
    if not sys.stderr.isatty():
        yield LineReporter(len(plan.jobs))
        return

    work = {n: metric(job.cell.metric).seconds(job, plan.threads) for n, job in enumerate(plan.jobs)}
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        yield TerminalReporter(progress, work)


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=16),
    MofNCompleteColumn(),
    TextColumn("{task.fields[said]}"),
)


def describe(job: Job) -> str:
    """ "smollm2-135m q8_0/turbo3 ppl c512"; the exact window if there is one, the anchor where it is not the
    build's default."""
    cell = job.cell
    anchor = f" anchor {cell.anchor}" if job.anchor is not None and cell.anchor != "auto" else ""
    window = f" window {cell.window}" if cell.window else ""
    return f"{cell.model} {cell.k}/{cell.v} {cell.metric} c{cell.ctx}{window}{anchor}"


def outcome(record: Record) -> str:
    """The record's figure in a few words, or its failure."""
    if not record.ok:
        return f"{record.status}: {record.detail}"
    known = METRICS.get(record.cell.metric)
    return known.words(record) if known is not None else record.status  # of a fork's metric


class LineReporter:
    """One line a cell on stderr."""

    def __init__(self, total: int) -> None:
        self.total = total

    def _say(self, number: int, text: str) -> None:
        print(f"[{number + 1}/{self.total}] {text}", file=sys.stderr, flush=True)

    def begin(self, number: int, job: Job) -> None:
        self._say(number, f"{describe(job)} …")

    def progress(
        self, number: int, chunk: int, total: int | None, ppl: float | None, base: float | None = None
    ) -> None:
        pass

    def end(self, number: int, record: Record, *, reused: bool) -> None:
        how = "on record" if reused else f"{record.run.seconds:.1f} s"
        pair = f"{record.cell.k}/{record.cell.v} {record.cell.metric}"
        self._say(number, f"{pair}: {outcome(record)} ({how})")

    def waiting(self, number: int, job: Job) -> None:
        self._say(number, f"{describe(job)}: another sweep runs it; waiting")

    def note(self, text: str) -> None:
        """Something about the sweep as a whole, e.g. a worker that was lost."""
        print(text, file=sys.stderr, flush=True)


class TerminalReporter(LineReporter):
    """A bar for the sweep, with the time left, and one for each running cell, with its ΔPPL so far; finished
    cells scroll up above them.

    Args:
        work: an estimate for each cell, in any unit.
    """

    def __init__(self, progress: Progress, work: Mapping[int, float]) -> None:
        super().__init__(len(work))
        self._progress = progress
        self._all = progress.add_task("cells", total=len(work), said="")
        self._cells: dict[int, TaskID] = {}
        self._deltas: dict[int, RunningDelta] = {}
        self._left = TimeLeft(dict(work), time.monotonic())

    def _say(self, number: int, text: str) -> None:
        self._progress.console.print(f"[dim]\\[{number + 1}/{self.total}][/dim] {text}", highlight=False)

    def begin(self, number: int, job: Job) -> None:
        self._drop(number)
        self._deltas[number] = RunningDelta()
        self._cells[number] = self._progress.add_task(describe(job), total=job.cell.chunks, said="")
        self._advance(number, 0.0)

    def progress(
        self, number: int, chunk: int, total: int | None, ppl: float | None, base: float | None = None
    ) -> None:
        if number not in self._cells:
            return
        said = f"PPL {ppl:.3f}" if ppl is not None else ""
        if ppl is not None and base is not None:
            delta = self._deltas[number].add(chunk, ppl, base)
            said = words_of_delta(delta) if delta is not None else said
        self._progress.update(self._cells[number], completed=chunk, total=total, said=said)
        self._advance(number, chunk / total if total else 0.0)

    def end(self, number: int, record: Record, *, reused: bool) -> None:
        super().end(number, record, reused=reused)
        self._drop(number)
        self._progress.advance(self._all)
        if reused:
            self._left.skip(number)
        self._advance(number, 1.0)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def _advance(self, number: int, share: float) -> None:
        self._left.advance(number, share)
        left = self._left.seconds(time.monotonic())
        self._progress.update(self._all, said=f"about {words_of_time(left)} left" if left > 0 else "")

    def _drop(self, number: int) -> None:
        if number in self._cells:
            self._progress.remove_task(self._cells.pop(number))
