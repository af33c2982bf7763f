"""Rows of a setting → points of the front: memory against loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from turbo_eval.analysis.figures import losses, usable
from turbo_eval.analysis.summary import Summary

Kind = Literal["alone", "window", "profile"]


@dataclass(frozen=True)
class Point:
    """A pair in the picture.

    Attributes:
        bits: bits per value of the whole cache, at the context of the picture.
        loss: mean KL divergence in nats, or ΔPPL in percent.
        error: its standard error; None: not known.
        kind: a pair alone, a pair with an exact window beside it, or types by layer from a profile.
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

    def said(self) -> str:
        """All that is drawn, in words."""
        points = "; ".join(f"{p.name}: {p.bits:.3g} bits, {p.loss:.3g}" for p in self.points)
        return f"{self.unit}, over bits per value at {self.ctx} tokens. {points}."

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
    numbers = {id(row): number for number, row in enumerate(rows)}
    found, unit = losses(rows)
    of: Literal["kld", "delta"] = "kld" if unit.startswith("KL") else "delta"
    size = ctx or (rows[0].ctx if rows else 0)
    points, destroyed = [], []
    for row, loss in found:
        if row.bpv >= 16:
            continue
        if not usable(row):
            destroyed.append(row.name)
            continue
        pair = row.k if row.k == row.v or row.profile is not None else f"{row.k}/{row.v}"
        kind: Kind = "profile" if row.profile is not None else "window" if row.window else "alone"
        bits, error = bits_at(row, size), _error(row, of)
        points.append(Point(row.name, pair, bits, loss, error, kind, numbers[id(row)]))
    if not points:
        return None
    return Front(tuple(_marked(points)), of, rows[0].against, size, tuple(destroyed))


def _error(row: Summary, of: str) -> float | None:
    """Standard error of the row's loss."""
    if of == "delta":
        return row.delta.err_pct if row.delta else None
    record = row.get("kld")
    return record.kld.mean_err if record is not None and record.kld is not None else None


def _marked(points: Sequence[Point]) -> list[Point]:
    """From few bits to many; those on the front are marked."""
    found, best = [], float("inf")
    for point in sorted(points, key=lambda p: (p.bits, p.loss)):
        found.append(replace(point, front=point.loss < best))
        best = min(best, point.loss)
    return found
