"""Greedy agreement: tokens generated the same as f16/f16's, up to the first that differs."""

from __future__ import annotations

import statistics
from typing import Any

from turbo_eval.metrics.base import Column, Options, n
from turbo_eval.metrics.generation import Generation
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Greedy, Record


class GreedyOptions(Options):
    """`tokens` generated after each of `prompts` passages of `prompt_tokens`."""

    prompts: n.Count = 4
    prompt_tokens: n.Context = 128
    tokens: n.Count = 32


class GreedyAgreement(Generation):
    name = "greedy"
    options = GreedyOptions
    columns = (Column("greedy same %", lambda r: r.greedy and r.greedy.agree_pct, "{:.1f}"),)
    docs = "docs/explanation/method.md#greedy-agreement"

    def context(self, cell: Cell) -> int:
        return int(cell.options["prompt_tokens"]) + int(cell.options["tokens"])

    def text(self, cell: Cell) -> int:
        return int(cell.options["prompt_tokens"]) * int(cell.options["prompts"])

    def steps(self, cell: Cell) -> int:
        return int(cell.options["prompts"])

    def figures(self, result: dict[str, Any], exact: Record | None) -> dict[str, Any]:
        outputs = tuple(tuple(o) for o in result["outputs"])
        known = exact.greedy.outputs if exact and exact.greedy else outputs
        return {"greedy": compare_greedy(outputs, known)}

    def words(self, record: Record) -> str:
        assert record.greedy is not None
        return f"greedy {record.greedy.agree_pct:.1f} % the same"


def compare_greedy(outputs: tuple[tuple[int, ...], ...], exact: tuple[tuple[int, ...], ...]) -> Greedy:
    """Count the tokens before the first difference, prompt by prompt."""
    firsts: list[int] = []
    agree = 0
    for ours, theirs in zip(outputs, exact, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is None and len(ours) != len(theirs):
            same = min(len(ours), len(theirs))
        agree += len(theirs) if same is None else same
        if same is not None:
            firsts.append(same)
    total = sum(len(theirs) for theirs in exact)
    return Greedy(
        prompts=len(exact),
        tokens=total,
        identical_pct=100 * (len(exact) - len(firsts)) / len(exact),
        agree_pct=100 * agree / total,
        first_divergence=statistics.median(firsts) if firsts else None,
        outputs=outputs,
    )
