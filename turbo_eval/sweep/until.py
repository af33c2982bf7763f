"""Measure more and more text until every pair is decided: chunks are added to those that are not.

Looking again and again is what a plain test does not allow. The verdicts here are read from a confidence
sequence (`turbo_eval.evidence.paired.sequence`), which holds at all looks together, so each pair's verdict is
wrong with a probability of 5 % at most, however often it was looked at and whenever it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from turbo_eval.errors import UsageError
from turbo_eval.evidence.paired import Decision
from turbo_eval.llama.build import Build
from turbo_eval.metrics import metric
from turbo_eval.metrics.base import Job
from turbo_eval.records.cell import Cell
from turbo_eval.records.pairing import pairing
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.records.reference import References, is_exact
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan, make_plan
from turbo_eval.sweep.run import Reporter, SweepResult, run_sweep
from turbo_eval.sweep.spec import SweepSpec

# Fewest chunks for a first look: with fewer the confidence sequence excludes nothing.
FIRST = 4
LEAST = 2  # chunks to add


@dataclass(frozen=True)
class Judged:
    """Where a pair stands: after `chunks` of the text."""

    record: Record
    decision: Decision | None
    chunks: int
    open: bool

    def __str__(self) -> str:
        cell = self.record.cell
        name = f"{cell.model} {cell.named().replace(':', '/', 1)}"
        if self.decision is None:
            return f"{name}: no verdict, it is {self.record.status}"
        found = self.decision.delta
        return (
            f"{name}: {self.decision.verdict} after {self.chunks} chunks, ΔPPL {found.value:+.2f} %"
            f" ({found.low:+.2f} to {found.high:+.2f} at all looks together)"
        )


def decided(decision: Decision) -> bool:
    """Is there a verdict?"""
    return decision.verdict != "undecided"


@dataclass
class UntilResult:
    """`judged` by pair, the last look at each; `sweep` holds every record that was looked at last."""

    judged: dict[str, Judged] = field(default_factory=dict)
    sweep: SweepResult = field(default_factory=SweepResult)
    looks: int = 0

    @property
    def scored(self) -> int:
        """Chunks of all pairs together."""
        return sum(one.chunks for one in self.judged.values())


def next_look(chunks: int, more: Iterable[int | None], most: int) -> int:
    """How many chunks the next look has: as many as the nearest pair seems to need, half as many again at
    least, and twice as many at most, because that guess is rough."""
    guess = min((n for n in more if n is not None), default=chunks)
    step = min(max(guess, chunks // 2, LEAST), chunks)
    return min(chunks + step, most)


def run_until_decided(
    spec: SweepSpec,
    build: Build,
    provenance: Provenance,
    store: Store,
    live: Callable[[Plan], AbstractContextManager[Reporter]],
    *,
    margin: float,
    most: int,
    fresh: bool = False,
    enough: Callable[[Decision], bool] = decided,
) -> UntilResult:
    """Run the sweep, then longer ones of the pairs that are undecided, up to `most` chunks.

    Args:
        margin: change of perplexity, in percent, that verdicts are about.
        enough: a pair that this is true of gets no more chunks.

    Raises:
        UsageError: the sweep compares nothing, or its pairs cannot be measured by llama-kv-eval.
        InterruptedSweepError, EnvironmentProblem: as `run_sweep`.
    """
    if not spec.reference:
        raise UsageError("without a reference nothing is ever decided", "leave --no-reference out")
    chunks = min(max(spec.chunks, FIRST), most)
    result = UntilResult()
    wanted: set[str] | None = None
    while True:
        plan = _look(spec, build, chunks, wanted)
        most = min([most, *(_holds(job) for job in plan.jobs)])
        with live(plan) as reporter:
            done = run_sweep(plan, provenance, store, reporter, fresh=fresh, sequential=True)
        result.looks += 1
        result.sweep.records += done.records
        result.sweep.reused += done.reused
        references = References.in_store(store, spec.against)
        for record in done.records:
            if metric(record.cell.metric).batched and not _is_reference(record.cell, spec):
                judged = _judge(looked_at(record, store), references, margin, chunks, enough)
                result.judged[_cache(record.cell)] = judged
        still = {name: one for name, one in result.judged.items() if one.open}
        if not still or chunks >= most:
            return result
        wanted = set(still)
        more = [one.decision.more_chunks for one in still.values() if one.decision is not None]
        chunks = next_look(chunks, more, most)


def _look(spec: SweepSpec, build: Build, chunks: int, wanted: set[str] | None) -> Plan:
    """The sweep of that many chunks; after the first look of those that are wanted, without what needs no
    repetition."""
    update: dict[str, object] = {"chunks": chunks}
    if wanted is not None:
        update["metrics"] = tuple(name for name in spec.metrics if metric(name).batched) or ("ppl",)
    plan = make_plan(spec.model_copy(update=update), build)
    lacking = [job for job in plan.jobs if metric(job.cell.metric).batched and job.cell.engine != "kv-eval"]
    if lacking:
        raise UsageError(
            "--until-decided needs figures of each token, which llama-perplexity does not give",
            'build llama-kv-eval (make build-cpu) and use engine = "kv-eval"',
        )
    if wanted is None:
        return plan
    kept = [job for job in plan.jobs if _is_reference(job.cell, spec) or _cache(job.cell) in wanted]
    return replace(plan, jobs=tuple(kept))


def _holds(job: Job) -> int:
    """Chunks that the text can have at most: a token has one byte at least."""
    return max(1, (job.corpus.size + 1) // job.cell.ctx)


def _is_reference(cell: Cell, spec: SweepSpec) -> bool:
    return is_exact(cell) or (cell.k, cell.v) == spec.against


def _cache(cell: Cell) -> str:
    """One cache of one comparison, whatever the number of chunks."""
    return cell.batched("ppl").model_copy(update={"chunks": 0, "metric": "ppl"}).key()


def looked_at(record: Record, store: Store) -> Record:
    """The record, which says that it was looked at: its number of chunks is no longer one that was fixed."""
    chunks = record.by_chunk
    if not record.ok or chunks is None or chunks.sequential:
        return record
    marked = record.model_copy(update={"by_chunk": chunks.model_copy(update={"sequential": True})})
    store.write(marked)
    return marked


def _judge(
    record: Record,
    references: References,
    margin: float,
    chunks: int,
    enough: Callable[[Decision], bool],
) -> Judged:
    reference = references.of(record) if record.ok else None
    paired = pairing(record, reference) if reference is not None else None
    decision = paired.decide(margin) if paired is not None else None
    return Judged(record, decision, chunks, decision is not None and not enough(decision))


def saved(result: UntilResult, most: int) -> str:
    """What stopping early was worth, in words."""
    pairs: Sequence[Judged] = list(result.judged.values())
    decided = sum(not one.open and one.decision is not None for one in pairs)
    return (
        f"{decided} of {len(pairs)} pairs decided in {result.looks} looks; {result.scored} chunks scored,"
        f" {len(pairs) * most} had every pair been given {most}"
    )
