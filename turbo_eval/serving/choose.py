"""Which cache to serve: a pair, a profile, the cheapest on record within a bound; what to expect of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.analysis.recommend import Bound, Candidate, best, recommend
from turbo_eval.analysis.summary import Summary, summarize
from turbo_eval.errors import IncompleteError, RegressionError
from turbo_eval.formats.window import OFF, resolve
from turbo_eval.inputs.kv_profile import read_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.records.record import Record
from turbo_eval.records.reference import References
from turbo_eval.records.store import Store
from turbo_eval.serving.line import EXACT_K, Cache
from turbo_eval.util.numbers import AUTO
from turbo_eval.util.process import relevant_environment


@dataclass(frozen=True)
class Choice:
    """A cache; the figures that were measured of it and their source, or "" and what to run to have some."""

    cache: Cache
    figures: str
    source: str


class Records:
    """What is on record for a model, this build, machine and environment.

    Args:
        name: of the model as the user gave it, for commands in messages.
    """

    def __init__(self, store: Store, file: ModelFile, name: str, build: Build) -> None:
        self._file, self._name, self._build = file, name, build
        env = relevant_environment()

        def counts(record: Record) -> bool:
            cell = record.cell
            return (
                (cell.model_sha256, cell.tree, cell.backend) == (file.sha256, build.tree, build.backend)
                and cell.env == env
            )  # fmt: skip

        known = [record for record in store.all() if counts(record)]
        self.rows: Sequence[Summary] = summarize(known, references=References.in_store(store))

    def cheapest(self, ctx: int, bound: Bound) -> Choice:
        """The smallest cache at `ctx` tokens that is certainly within `bound`.

        Raises:
            IncompleteError: nothing was measured, or not enough to tell.
            RegressionError: every pair on record is out.
        """
        ask = " ".join(said_of_bound(bound))
        measure = f"`turbo-eval recommend {self._name} {ask}`"
        ranked = recommend(self.rows, self._file.gguf, ctx, bound)
        good = best(ranked)
        if good:
            return _of(good[0])
        if not ranked:
            raise IncompleteError(
                f"nothing is on record for {self._file.name} with this build and machine",
                f"measure with {measure}, or name a cache with --pair K:V",
            )
        if any(candidate.within is None for candidate in ranked):
            raise IncompleteError(
                f"no pair on record is certainly within {ask}", f"measure more with {measure} --chunks 32"
            )
        if all(_distance(candidate.row, bound) == math.inf for candidate in ranked):
            raise IncompleteError(
                f"what is on record for {self._file.name} does not say whether it is within {ask}",
                f"measure with {measure}",
            )
        near = min(ranked, key=lambda c: _distance(c.row, bound))
        raise RegressionError(
            f"no pair on record is within {ask}; the nearest is {near.name} with {near.figures()}",
            "take a larger bound, or name a cache with --pair",
        )

    def pair(self, k: str, v: str) -> Choice:
        """A pair as llama.cpp runs it by itself, with the figures of the longest text on record."""
        cache = Cache(k, v)
        own = resolve(AUTO, AUTO, k, v) if capabilities(self._build).kv_window else OFF
        rows = [
            row
            for row in self.rows
            if (row.k, row.v, row.window) == (k, v, own)
            and (row.anchor in (AUTO, "") or row.k in EXACT_K)  # which has no anchor
        ]
        told = [row for row in rows if row.status == "ok" and row.get("kld")]
        told = told or [row for row in rows if row.status == "ok" and row.delta is not None]
        if told:
            row = max(told, key=lambda r: r.ctx * r.chunks)
            return Choice(cache, *_figures(Candidate(row, 0.0, ())))
        step = f"`turbo-eval sweep --model {self._name} --pairs {k}:{v} --metrics kld`"
        return Choice(cache, "", f"not measured here; {step} tells")


def _distance(row: Summary, bound: Bound) -> float:
    """How far a row's figure is over the bound; infinite where it was not measured, or is the reference."""
    kld = row.get("kld")
    if row.status != "ok" or row.is_reference:
        return math.inf
    if bound.max_kld is not None:
        return kld.kld.mean - bound.max_kld if kld is not None and kld.kld else math.inf
    return row.delta.pct - (bound.max_delta_ppl or 0.0) if row.delta is not None else math.inf


def profile(path: Path) -> Choice:
    """A profile, with the figure in its file.

    Raises:
        UsageError: it is no profile.
    """
    told = read_profile(path).profile
    cache = Cache(profile=path)
    if told.held_out is None:
        return Choice(cache, "", "the profile does not say; `turbo-eval tune` writes it")
    where = told.provenance
    source = " ".join(filter(None, ("measured on text that was held out of", where.get("corpus.name"))))
    if "held_out" in where:
        source += f", {where['held_out']}"
    return Choice(cache, f"KLD {told.held_out:.4f}", f"{source} [{path.name}]")


def cache_of(row: Summary) -> Cache:
    """What the row's records were measured with."""
    if row.profile_file is not None:
        return Cache(profile=row.profile_file, anchor=row.anchor, window=row.window)
    return Cache(row.k, row.v, anchor=row.anchor, window=row.window)


def _of(candidate: Candidate) -> Choice:
    return Choice(cache_of(candidate.row), *_figures(candidate))


def _figures(candidate: Candidate) -> tuple[str, str]:
    record = candidate.row.get("kld") or candidate.row.records[0]
    return candidate.figures(), f"{candidate.source()} [record {record.key}]"


def said_of_bound(bound: Bound) -> list[str]:
    """The bound as options."""
    parts = []
    if bound.max_kld is not None:
        parts += ["--max-kld", f"{bound.max_kld:g}"]
    if bound.max_delta_ppl is not None:
        parts += ["--max-delta-ppl", f"{bound.max_delta_ppl:g}%"]
    return parts
