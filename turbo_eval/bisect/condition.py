"""The `--bad-if` condition: arithmetic and comparisons over a cell's numbers, nothing else."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping

from simpleeval import InvalidExpression, SimpleEval

from turbo_eval.errors import UsageError
from turbo_eval.records.record import Record
from turbo_eval.util.text import meant

# `baseline` is the number that the condition's first name has at the good revision; `f16` the
# perplexity of f16:f16 at the same revision.
NAMES = ("ppl", "ppl_err", "kld", "kld_p99", "same_top", "baseline", "f16")

# All that a condition may do; comparisons are chained and joined by and, or as in Python.
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


class Condition:
    """A parsed condition, e.g. `ppl > 1.05 * baseline`.

    Attributes:
        text: as given.
        names: what it uses.
        subject: its first measured name; `baseline` is that number at the good revision.

    Raises:
        UsageError: not a comparison of known names and numbers.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError:
            raise _unreadable(text, "it is no expression") from None
        if not isinstance(self._tree, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            raise _unreadable(text, "it compares nothing")
        found = [node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)]
        for name in found:
            if name not in NAMES:
                raise UsageError(f"--bad-if {text!r}: unknown name {name}", meant(name, NAMES))
        self.names = frozenset(found)
        measured = [name for name in found if name not in ("baseline", "f16")]
        if not measured:
            raise _unreadable(text, "it names no number of the cell")
        self.subject = measured[0]
        self.holds(dict.fromkeys(NAMES, 1.0))

    def holds(self, values: Mapping[str, float]) -> bool:
        """Evaluate it."""
        evaluator = SimpleEval(operators=_OPERATORS, functions={}, names=dict(values))
        try:
            return bool(evaluator.eval(self.text, previously_parsed=self._tree))
        except (InvalidExpression, TypeError, NotImplementedError) as error:
            raise _unreadable(self.text, f"{error}") from None


def _unreadable(text: str, why: str) -> UsageError:
    return UsageError(f"--bad-if {text!r} cannot be used: {why}", "write it like 'ppl > 1.05 * baseline'")


def numbers(record: Record) -> dict[str, float]:
    """What a good record offers to a condition."""
    found = {"ppl": record.ppl, "ppl_err": record.ppl_err}
    if record.kld is not None:
        found |= {"kld": record.kld.mean, "kld_p99": record.kld.p99, "same_top": record.kld.same_top_pct}
    return {name: value for name, value in found.items() if value is not None}
