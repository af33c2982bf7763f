"""What a benchmark measures: caches × steps, and the rounds in which they take turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbo_eval.anchor.profile import Cache
from turbo_eval.formats.window import OFF, Window, resolve
from turbo_eval.records.cell import CellProfile
from turbo_eval.records.reference import EXACT
from turbo_eval.records.speed import Workload
from turbo_eval.util.numbers import TokensOrAuto

TOOL = {"depth": "llama-bench", "draft": "llama-bench", "parallel": "llama-batched-bench"}


@dataclass(frozen=True)
class Candidate:
    """What is measured: K, V, the K anchor and the exact window (None: the build has none), or a profile."""

    k: str
    v: str
    anchor: str | None
    window: Window | None
    profile: Path | None = None
    of_cell: CellProfile | None = None


@dataclass(frozen=True)
class Step:
    """What one process measures of a candidate: one record for each of `sizes`.

    Attributes:
        depth: tokens in the cache before the test; 0 for "parallel", whose prompts fill it.
        sizes: "parallel": sequences; "draft": new tokens; "depth": 1 alone.
    """

    workload: Workload
    depth: int
    sizes: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        if self.workload == "parallel":
            return f"{_listed(self.sizes)} sequences"
        return f"depth {self.depth}" + (
            f" drafts of {_listed(self.sizes)}" if self.workload == "draft" else ""
        )


def _listed(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))


@dataclass(frozen=True)
class BenchPlan:
    """Pairs × anchors × exact windows, and f16/f16, over steps; `reps` interleaved rounds.

    Depth is what is measured where neither `parallel` nor `draft` holds sizes. `anchors` holds None alone
    where the build has no anchor; `windowed` says whether it has the exact window, whose sizes are `recent`
    and `first` tokens.
    """

    pairs: tuple[tuple[str, str], ...]
    depths: tuple[int, ...]
    prompt: int
    gen: int
    reps: int
    threads: int
    backend: str
    anchors: tuple[str | None, ...]
    timeout: float | None = None
    windowed: bool = False
    recent: tuple[TokensOrAuto, ...] = ("auto",)
    first: TokensOrAuto = "auto"
    profiles: tuple[Cache, ...] = ()
    parallel: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()

    def candidates(self) -> list[Candidate]:
        """f16/f16 first, each once."""
        off = OFF if self.windowed else None
        reference = Candidate(*EXACT, None if None in self.anchors else "off", off)
        others = [
            Candidate(k, v, anchor, resolve(recent, self.first, k, v) if self.windowed else None)
            for k, v in self.pairs
            if (k, v) != EXACT
            for anchor in self.anchors
            for recent in self.recent
        ]
        files = [
            Candidate(c.k, c.v, anchor, c.window, c.profile.path, c.of_cell())
            for c in self.profiles
            if c.profile is not None
            for anchor in self.anchors
        ]
        return list(dict.fromkeys([reference, *others, *files]))

    def steps(self) -> list[Step]:
        """In the order they are measured. A draft of one token, which is decode, is always among the drafts:
        what the others cost is told from it."""
        steps = [Step("parallel", 0, tuple(sorted(set(self.parallel))))] if self.parallel else []
        if self.draft:
            steps += [Step("draft", depth, tuple(sorted({1, *self.draft}))) for depth in self.depths]
        return steps or [Step("depth", depth) for depth in self.depths]

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        ends = {"depth": self.prompt + self.gen, "parallel": self.prompt + self.gen}
        return max(
            s.depth + (max(s.sizes) if s.workload == "draft" else ends[s.workload]) for s in self.steps()
        )
