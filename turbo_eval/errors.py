"""Errors a user can act on: each carries its exit code and its next step.

Exit codes: 0 pass, 1 regression, 2 bad usage or config, 3 incomplete, 4 environment.
"""

from __future__ import annotations

from typing import ClassVar


class TurboEvalError(Exception):
    """Something the user can fix.

    Args:
        message: one clause that names the thing and the reason, without a final full stop.
        next_step: what to do about it, e.g. a command; printed after the message and a semicolon.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def sentence(self) -> str:
        """The one sentence to print."""
        text = self.message.strip().rstrip(".")
        step = self.next_step.strip().rstrip(".")
        return f"{text}; {step}." if step else f"{text}."


class RegressionError(TurboEvalError):
    """A measured number broke a threshold."""

    exit_code = 1


class UsageError(TurboEvalError):
    """Bad command line, config, model or corpus."""

    exit_code = 2


class IncompleteError(TurboEvalError):
    """Cells or a baseline are missing, failed or stale: no verdict is possible."""

    exit_code = 3


class EnvironmentProblem(TurboEvalError):
    """Toolchain, source, build, network or disk is not there."""

    exit_code = 4
