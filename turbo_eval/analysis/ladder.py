"""Measures what a recommendation lacks, the cheapest pair first, until one is certainly within."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from turbo_eval.analysis.recommend import Bound, Candidate, best, recommend, shape_mib
from turbo_eval.analysis.summary import Summary, summarize
from turbo_eval.formats.cache_types import undivided, usual_pairs
from turbo_eval.formats.window import Window, resolve
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.records.reference import References
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan, estimate_seconds, make_plan
from turbo_eval.sweep.progress import live
from turbo_eval.sweep.run import run_sweep
from turbo_eval.sweep.spec import sweep_spec
from turbo_eval.sweep.until import looked_at, next_look
from turbo_eval.util.numbers import TokensOrAuto

Pair = tuple[str, str]
LADDER: tuple[Pair, ...] = usual_pairs()


@dataclass(frozen=True)
class Windows:
    """The exact windows that are asked for, as options or a sweep name them."""

    recent: tuple[TokensOrAuto, ...]
    first: TokensOrAuto

    def of(self, pair: Pair) -> set[Window]:
        """What that is for a pair; none where both types have 8 bits or more."""
        return {resolve(recent, self.first, *pair) for recent in self.recent}


@dataclass(frozen=True)
class Wish:
    """What is measured where something is missing: text, chunks, context, and how.

    `windows` None: any that is on record will do, and llama.cpp's own is measured.
    """

    model: ModelFile
    name: str  # as the user gave it
    corpus: str
    chunks: int
    ctx: int
    threads: int | None
    kld: bool
    windows: Windows | None = None


class Ladder:
    """Measures pair after pair.

    Args:
        matches: which records count.
    """

    def __init__(
        self,
        wish: Wish,
        build: Build,
        provenance: Provenance,
        store: Store,
        matches: Callable[[Record], bool],
    ) -> None:
        self.wish, self.build, self.provenance, self.store = wish, build, provenance, store
        self._matches = matches
        self._corpus = ""  # its name in records, where chunks are added

    def rows(self) -> list[Summary]:
        """What is on record."""
        known = [record for record in self.store.all() if self._matches(record)]
        return summarize(known, references=References.in_store(self.store))

    def pairs(self) -> list[Pair]:
        """The pairs that build and model can run, the cheapest first."""
        known, info = capabilities(self.build).cache_types, self.wish.model.gguf
        return [
            (k, v)
            for k, v in LADDER
            if {k, v} <= known and not undivided(info.head_dim_k or 0, info.head_dim_v or 0, k, v)
        ]

    def missing(self, rows: Sequence[Summary], ctx: int, bound: Bound) -> list[Pair]:
        """Pairs without a figure that are smaller than the best that is certain: larger ones cannot win."""
        info = self.wish.model.gguf
        good = best(recommend(rows, info, ctx, bound))
        limit = min((c.memory_mib for c in good), default=float("inf"))
        have = {
            (r.k, r.v, r.window)
            for r in rows
            if r.status != "ok"
            or (
                (bound.max_kld is None or r.get("kld"))
                and (bound.max_delta_ppl is None or r.delta is not None)
            )
        }
        fits = float("inf") if bound.memory_gib is None else bound.memory_gib * 1024
        sizes = {pair: shape_mib(pair, info, ctx) for pair in self.pairs()}
        return [p for p, size in sizes.items() if self._lacks(p, have) and size < limit and size <= fits]

    def _lacks(self, pair: Pair, have: Set[tuple[str, str, Window]]) -> bool:
        if self.wish.windows is None:
            return not any(pair == (k, v) for k, v, _ in have)
        return any((*pair, window) not in have for window in self.wish.windows.of(pair))

    def climb(self, ctx: int, bound: Bound, most: int | None = None) -> list[Summary]:
        """Measure what is missing until the cheapest pair within the bound is certain; returns all rows.

        Args:
            most: chunks are added to a pair that is not decided, as many as that at most; None: none are.
        """
        rows = self.rows()
        if most is not None:
            self._corpus = self._plan(self.pairs()[:1]).jobs[0].cell.corpus
        missing = self.missing(rows, ctx, bound)
        if missing:
            self._announce(missing)
        tried: set[Pair] = set()
        while missing := [p for p in self.missing(rows, ctx, bound) if p not in tried]:
            tried.add(missing[0])
            self._run(missing[0], self.wish.chunks, looking=most is not None)
            rows = self.rows()
            if most is not None:
                rows = self._settle(missing[0], rows, ctx, bound, most)
        if most is not None:  # what was on record before, and is cheaper than what is certain
            for pair in [p for p in self.pairs() if p not in tried]:
                if self._open(pair, rows, ctx, bound):
                    rows = self._settle(pair, rows, ctx, bound, most)
        return rows

    def _run(self, pair: Pair, chunks: int, *, looking: bool) -> None:
        plan = self._plan([pair], chunks)
        with live(plan) as reporter:
            done = run_sweep(plan, self.provenance, self.store, reporter, sequential=looking)
        for record in done.records if looking else ():
            looked_at(record, self.store)

    def _settle(
        self, pair: Pair, rows: Sequence[Summary], ctx: int, bound: Bound, most: int
    ) -> list[Summary]:
        """Add chunks to a pair until it is decided."""
        while open_ := self._open(pair, rows, ctx, bound):
            chunks = max(c.row.chunks for c in open_)
            longer = next_look(chunks, [None], most)
            if longer <= chunks:
                break
            self._run(pair, longer, looking=True)
            rows = self.rows()
        return list(rows)

    def _open(self, pair: Pair, rows: Sequence[Summary], ctx: int, bound: Bound) -> list[Candidate]:
        """The caches of a pair that the text cannot decide and that could still win."""
        ranked = recommend(rows, self.wish.model.gguf, ctx, bound)
        limit = min((c.memory_mib for c in best(ranked)), default=float("inf"))
        return [
            c
            for c in ranked
            if (c.row.k, c.row.v) == pair
            and c.within is None
            and c.memory_mib < limit
            and (c.row.corpus, c.row.ctx) == (self._corpus, self.wish.ctx)
        ]

    def _plan(self, pairs: Sequence[Pair], chunks: int | None = None) -> Plan:
        wish = self.wish
        data: dict[str, Any] = {
            "model": wish.name,
            "corpus": wish.corpus,
            "pairs": [f"{k}:{v}" for k, v in pairs],
            "chunks": chunks or wish.chunks,
            "ctx": wish.ctx,
            "backend": self.build.backend,
            "metrics": ["kld"] if wish.kld else ["ppl"],
        }
        if wish.windows is not None:
            data |= {"recent": list(wish.windows.recent), "first": wish.windows.first}
        if wish.threads is not None:
            data["threads"] = wish.threads
        return make_plan(sweep_spec(data, "recommend"), self.build)

    def _announce(self, pairs: Sequence[Pair]) -> None:
        plan = self._plan(pairs)
        known = self.store.all()
        have = {record.key for record in known if record.ok}
        plan = replace(plan, jobs=tuple(job for job in plan.jobs if job.cell.key() not in have))
        seconds = sum(estimate_seconds(job, known, plan.threads) for job in plan.jobs)
        names = ", ".join(f"{k}/{v}" for k, v in pairs)
        wish = self.wish
        print(
            f"turbo-eval: not on record: {names}; measuring on {wish.chunks} chunks of {wish.ctx} tokens,"
            f" the smallest first, until one is certainly within the bound: {len(plan.jobs)} cells at most,"
            f" roughly {max(seconds / 60, 0.1):.1f} min (--no-measure leaves it at what is on record)",
            file=sys.stderr,
        )
