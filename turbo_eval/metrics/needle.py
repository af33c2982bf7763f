"""Needle retrieval: a number planted in the text, found where f16/f16 finds it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from turbo_eval.metrics.base import Column, Options, n
from turbo_eval.metrics.generation import Generation
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Needle, Record


class NeedleOptions(Options):
    """Context lengths in tokens, depths as fractions of the context."""

    lengths: tuple[n.Context, ...] = Field(default=(512, 1024), min_length=1)
    depths: tuple[n.Fraction, ...] = Field(default=(0.1, 0.5, 0.9), min_length=1)


def _shown(record: Record) -> str | None:
    return f"{record.needle.hits}/{record.needle.f16_hits}" if record.needle else None


class NeedleRetrieval(Generation):
    name = "needle"
    options = NeedleOptions
    columns = (Column("needle", _shown),)
    docs = "docs/explanation/method.md#needle-retrieval"

    def context(self, cell: Cell) -> int:
        return int(max(cell.options["lengths"])) + 16

    def text(self, cell: Cell) -> int:
        return int(max(cell.options["lengths"]))

    def steps(self, cell: Cell) -> int:
        return len(cell.options["lengths"]) * len(cell.options["depths"])

    def figures(self, result: dict[str, Any], exact: Record | None) -> dict[str, Any]:
        hits = [tuple(d) for d in result["detail"]]
        return {"needle": compare_needle(hits, exact.needle if exact else None)}

    def words(self, record: Record) -> str:
        assert record.needle is not None
        return f"needle {record.needle.hits} of {record.needle.f16_hits}"


def compare_needle(hits: list[tuple[Any, ...]], exact: Needle | None) -> Needle:
    """A probe counts only where f16 finds the needle."""
    truth = [found for _, _, _, found in exact.detail] if exact else [bool(h[2]) for h in hits]
    detail = tuple(
        (int(length), float(depth), known, bool(found))
        for (length, depth, found), known in zip(hits, truth, strict=True)
    )
    return Needle(
        probes=len(detail),
        f16_hits=sum(f for _, _, f, _ in detail),
        hits=sum(f and hit for _, _, f, hit in detail),
        detail=detail,
    )
