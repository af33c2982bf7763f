"""Which commit made a cell bad: build, run the one cell, tell git, until it names the first bad one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from turbo_eval.bisect.builder import Builder
from turbo_eval.bisect.condition import Condition, numbers
from turbo_eval.bisect.history import History, UntestableError, bisect_dir, search
from turbo_eval.errors import UsageError
from turbo_eval.inputs.corpora import default_name, resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.provenance import collect, machine
from turbo_eval.metrics.base import Job
from turbo_eval.records.record import Record, Status
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import make_plan
from turbo_eval.sweep.run import run_sweep
from turbo_eval.sweep.spec import SweepSpec
from turbo_eval.util.files import lock
from turbo_eval.util.paths import results_dir

__all__ = ["Answer", "Bisection", "Condition", "Estimate", "Tested", "UntestableError"]

# A cell that ends like this is as bad as a bad number.
BAD_STATUS: frozenset[Status] = frozenset(
    {"nan", "crash", "timeout", "no-result", "state-mismatch", "cpu-fallback", "decode-mismatch"}
)

_IS = {"good": "is good", "bad": "is bad", "skip": "cannot be tested"}


@dataclass(frozen=True)
class Tested:
    """A revision with its verdict: "good", "bad" or "skip", and the number or reason in words."""

    commit: str
    verdict: str
    words: str
    value: float | None = None


@dataclass(frozen=True)
class Answer:
    """`first_bad` and the revision before it; None with `candidates` if skips hide the answer."""

    first_bad: Tested | None
    before: Tested | None
    candidates: tuple[str, ...]
    tested: tuple[Tested, ...]
    builds: int


@dataclass(frozen=True)
class Estimate:
    """For --dry-run. Seconds; None where nothing was built or measured here yet."""

    commits: int
    steps: int
    builds: int
    first_build: float | None
    cell: float | None


@dataclass
class Bisection:
    """A search over `history` from `good` to `bad` (full commit ids).

    `spec` asks for one metric of one pair or profile, and of f16:f16 where the condition names it; `say`
    hears one line a step.
    """

    history: History
    good: str
    bad: str
    spec: SweepSpec
    condition: Condition
    builder: Builder
    say: Callable[[str], None]
    baseline: float | None = None
    _tested: dict[str, Tested] = field(default_factory=dict)

    def estimate(self) -> Estimate:
        """How far it is, without building anything."""
        commits = len(self.history.between(self.good, self.bad))
        steps = math.ceil(math.log2(commits)) if commits > 1 else 0
        ends = 1 + (commits == 1)
        return Estimate(commits, steps, steps + ends, self.builder.estimate_seconds(), self._cell_seconds())

    def _cell_seconds(self) -> float | None:
        """The median time of this model's records here, for as much text; None without any."""
        cells = len(self.spec.pairs) + len(self.spec.profiles)
        work = self.spec.ctx[0] * self.spec.chunks * cells
        known = [r for store in self._stores() for r in store.all()]
        rates = sorted(
            r.run.seconds / (r.cell.ctx * r.cell.chunks)
            for r in known
            if r.ok and r.cell.metric == self.metric and r.cell.model in self.spec.models
        )
        return work * rates[len(rates) // 2] if rates else None

    @staticmethod
    def _stores() -> tuple[Store, Store]:
        here = machine().id
        return Store(bisect_dir() / "results", here), Store(results_dir(), here)

    @property
    def metric(self) -> str:
        """The metric the verdict is on; a decode cell brings its batched one along."""
        return self.spec.metrics[0]

    def run(self) -> Answer:
        """Search. Interrupted, it can be run again: builds and numbers are kept by tree.

        Raises:
            UsageError: the good revision is bad, the bad one good, or one of them cannot be tested.
        """
        with lock(bisect_dir() / "bisect"):  # one search at a time: they share sources and build folder
            return self._run()

    def _run(self) -> Answer:
        self.history.between(self.good, self.bad)
        # What is wrong with the request would otherwise look like revisions that cannot be tested.
        for name in self.spec.models:
            resolve_model(name)
        resolve_corpus(default_name() if self.spec.corpus == "default" else self.spec.corpus)
        good = self.measure(self.good)
        if good.verdict != "good":
            raise UsageError(
                f"--good {self.good[:12]} {_IS[good.verdict]}: {good.words}", "name another revision"
            )
        with search(self.history, self.good, self.bad) as state:
            while state.current:
                state.judge(self.measure(state.current).verdict)
        if not state.first_bad:
            return Answer(None, None, state.candidates, tuple(self._tested.values()), self.builder.made)
        first = self.measure(state.first_bad)
        if first.verdict != "bad":
            raise UsageError(
                f"--bad {first.commit[:12]} {_IS[first.verdict]}: {first.words}",
                f"check that it fulfils {self.condition.text!r}",
            )
        before = self._tested.get(self.history.commit(f"{first.commit}^"))
        return Answer(first, before, (), tuple(self._tested.values()), self.builder.made)

    def measure(self, commit: str) -> Tested:
        """Build and run one revision, once."""
        if commit not in self._tested:
            self._tested[commit] = found = self._measure(commit)
            self.say(f"{found.verdict:4}  {self.history.subject(commit)}: {found.words}")
        return self._tested[commit]

    def _measure(self, commit: str) -> Tested:
        try:
            records = self._records(self.history.llama_commit(commit))
        except UntestableError as error:
            return Tested(commit, "skip", error.message)
        of_metric = {r.cell.pair(): r for r in records if r.cell.metric == self.metric}
        [record] = [
            r
            for pair, r in of_metric.items()
            if (r.cell.profile is not None if self.spec.profiles else pair == ":".join(self.spec.pairs[-1]))
        ]
        for each in (record, *records):
            if not each.ok:
                words = f"{each.cell.pair()} is {each.status}: {each.detail}"
                return Tested(commit, "bad" if each.status in BAD_STATUS else "skip", words)
        values = numbers(record)
        exact = of_metric.get("f16:f16")
        if exact is not None and exact.ppl is not None:
            values["f16"] = exact.ppl
        subject = values[self.condition.subject]
        if self.baseline is None:  # the first revision measured is the good one
            self.baseline = subject
        bad = self.condition.holds(values | {"baseline": self.baseline})
        words = ", ".join(f"{name} {values[name]:.6g}" for name in values if name in self.condition.names)
        return Tested(commit, "bad" if bad else "good", words, subject)

    def _records(self, llama_commit: str) -> list[Record]:
        build = self.builder.build(llama_commit)
        try:
            # the same way of measuring at every commit: llama-kv-eval came late
            spec = self.spec.model_copy(update={"engine": "llama-perplexity"})
            plan = make_plan(spec, build)
        except UsageError as error:
            # The type or option came later in history.
            raise UntestableError(error.message) from None
        return run_sweep(plan, collect(build), self._stores()[0], _Silent()).records


class _Silent:
    """A sweep that says nothing: a bisection speaks in revisions."""

    def begin(self, number: int, job: Job) -> None:
        pass

    def progress(
        self, number: int, chunk: int, total: int | None, ppl: float | None, base: float | None = None
    ) -> None:
        pass

    def end(self, number: int, record: Record, *, reused: bool) -> None:
        pass

    def waiting(self, number: int, job: Job) -> None:
        pass

    def note(self, text: str) -> None:
        pass
