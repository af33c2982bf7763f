"""Retrieval: generated puzzles that f16/f16 solves, solved with another cache, compared by McNemar's test."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from turbo_eval.evidence.paired import mcnemar
from turbo_eval.metrics.base import Column, Options, figure, n
from turbo_eval.metrics.generation import Generation
from turbo_eval.metrics.generation.puzzles import KINDS, Kind
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record


class RetrievalOptions(Options):
    """`puzzles` of each of `kinds` at each of `lengths` in tokens, with `several` keys, values or links."""

    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    lengths: tuple[n.Context, ...] = Field(default=(512, 1024), min_length=1)
    puzzles: n.Count = 4
    several: n.Count = Field(default=3, le=20)


def _shown(record: Record) -> str | None:
    told = record.figures
    return f"{told['retrieval_kept']:.0f}/{told['retrieval_f16']:.0f}" if "retrieval_f16" in told else None


class Retrieval(Generation):
    name = "retrieval"
    options = RetrievalOptions
    columns = (Column("retrieval", _shown), figure("retrieval_p", "retrieval p", "{:.3f}"))
    docs = "docs/explanation/method.md#retrieval"

    def context(self, cell: Cell) -> int:
        return int(max(cell.options["lengths"])) + 10 * int(cell.options["several"]) + 16

    def text(self, cell: Cell) -> int:
        return int(max(cell.options["lengths"]))

    def steps(self, cell: Cell) -> int:
        options = cell.options
        return len(options["kinds"]) * len(options["lengths"]) * int(options["puzzles"])

    def figures(self, result: dict[str, Any], exact: Record | None) -> dict[str, Any]:
        solved = "".join("1" if hit else "0" for hit in result["solved"])
        known = str(exact.figures["retrieval_solved"]) if exact is not None else solved
        return {"figures": compare_retrieval(solved, known)}

    def words(self, record: Record) -> str:
        return f"retrieval {_shown(record)} of what f16 solves, p {record.figures['retrieval_p']:.3f}"


def compare_retrieval(solved: str, exact: str) -> dict[str, float | str]:
    """Outcomes ("1": solved) of a cache and of f16/f16 on the same puzzles.

    `retrieval_kept` of the `retrieval_f16` puzzles that f16 solves are solved; `retrieval_lost` are not, and
    `retrieval_won` only by this cache; `retrieval_p` is McNemar's exact p of "as often lost as won".
    """
    pairs = list(zip(solved, exact, strict=True))
    lost, won = pairs.count(("0", "1")), pairs.count(("1", "0"))
    return {
        "retrieval_puzzles": len(pairs),
        "retrieval_f16": exact.count("1"),
        "retrieval_kept": exact.count("1") - lost,
        "retrieval_lost": lost,
        "retrieval_won": won,
        "retrieval_p": mcnemar(lost, won),
        "retrieval_solved": solved,
    }
