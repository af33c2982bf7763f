"""Rows of a setting → points of the front: memory against loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from turbo_eval.analysis.summary import Summary

# Perplexity more than doubled: no size makes up for that.
UNUSABLE_PCT = 100.0

Kind = Literal["alone", "window"]


@dataclass(frozen=True)
class Point:
    """A pair in the picture.

    Attributes:
        bits: bits per value of the whole cache, at the context of the picture.
        loss: mean KL divergence in nats, or ΔPPL in percent.
        error: its standard error; None: not known.
        kind: with an exact window beside the cache, or alone.
        front: does no other point have both less memory and less loss?
        row: number of the pair in its table, from 0.
    """

    name: str
    pair: str
    bits: float
    loss: float
    error: float | None
    kind: Kind
    row: int
    front: bool = False


@dataclass(frozen=True)
class Front:
    """Points of one setting, what their losses are, and who is left out because its model is destroyed."""

    points: tuple[Point, ...]
    of: Literal["kld", "delta"]
    against: str
    ctx: int
    destroyed: tuple[str, ...]

    @property
    def unit(self) -> str:
        """The loss's name and unit."""
        return "KL divergence from f16/f16, nats" if self.of == "kld" else f"ΔPPL against {self.against}, %"

    def best(self) -> list[Point]:
        """The front, from few bits to many."""
        return [point for point in self.points if point.front]


def bits_at(row: Summary, ctx: int) -> float:
    """Bits per value of the whole cache at `ctx` tokens: an exact window has one size at any context."""
    alone = (row.bpv_k + row.bpv_v) / 2
    state = next((r.effective for r in row.records if r.effective.window_mib), None)
    if state is None or state.kv_mib is None or not state.window_mib or not state.ctx:
        return alone
    plain = (state.kv_mib - state.window_mib) * ctx / state.ctx
    return alone * (plain + state.window_mib) / plain


def front(rows: Sequence[Summary], ctx: int | None = None) -> Front | None:
    """The picture of a setting's quantized pairs; None: there are none with a loss.

    Args:
        ctx: tokens that memory is counted at; None: those that were measured.
    """
    compared = [(n, r) for n, r in enumerate(rows) if r.status == "ok" and not r.is_reference and r.bpv < 16]
    measured = [(n, r.get("kld")) for n, r in compared]
    klds = {n: found.kld for n, found in measured if found is not None and found.kld is not None}
    deltas = {n: r.delta for n, r in compared if r.delta is not None}
    of: Literal["kld", "delta"] = "kld" if len(klds) >= max(1, len(deltas)) else "delta"
    size = ctx or (rows[0].ctx if rows else 0)
    points, destroyed = [], []
    for number, row in compared:
        if row.delta_pct is not None and row.delta_pct > UNUSABLE_PCT:
            destroyed.append(row.name)
            continue
        kind: Kind = "window" if row.window else "alone"
        if of == "kld" and number in klds:
            loss, error = klds[number].mean, klds[number].mean_err
        elif of == "delta" and number in deltas:
            loss, error = deltas[number].pct, deltas[number].err_pct
        else:
            continue
        pair = f"{row.k}/{row.v}" if row.k != row.v else row.k
        points.append(Point(row.name, pair, bits_at(row, size), loss, error, kind, number))
    if not points:
        return None
    return Front(tuple(_marked(points)), of, rows[0].against, size, tuple(destroyed))


def _marked(points: Sequence[Point]) -> list[Point]:
    """From few bits to many; those on the front are marked."""
    found, best = [], float("inf")
    for point in sorted(points, key=lambda p: (p.bits, p.loss)):
        found.append(replace(point, front=point.loss < best))
        best = min(best, point.loss)
    return found
