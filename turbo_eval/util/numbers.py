"""Numbers that people give, in a TOML file or on the command line: one kind of check for both.

Not finite, out of range, a boolean, a text where a number belongs: refused with the reason. What compares
with nothing (`x > nan` is never true) must not come to be a threshold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from turbo_eval.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """What a number may be.

    Attributes:
        words: what it is, to end the sentence "give …".
        low, high: smallest and largest value allowed.
        above: it must be more than this.
        whole: only integers.
    """

    words: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    whole: bool = False

    def check(self, value: object) -> float:
        """The value, as int or float.

        Raises:
            ValueError: with the reason and what to give instead.
        """
        reason = self._fault(value)
        if reason:
            raise ValueError(f"{reason}; give {self.words}")
        assert isinstance(value, (int, float))
        return int(value) if self.whole else float(value)

    def _fault(self, value: object) -> str:
        if isinstance(value, bool):
            return f"{str(value).lower()} is no number"
        if not isinstance(value, (int, float)):
            return f"{value!r} is no number"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not finite"
        if self.whole and value != int(value):
            return f"{value} is not whole"
        if self.low is not None and value < self.low:
            return f"{value} is below {self.low:.12g}"
        if self.above is not None and value <= self.above:
            return f"{value} is not above {self.above:.12g}"
        if self.high is not None and value > self.high:
            return f"{value} is above {self.high:.12g}"
        return ""

    def parse(self, text: str) -> float:
        """The number that a text spells.

        Raises:
            ValueError: as `check`.
        """
        plain = text.strip()
        if self.whole and re.fullmatch(r"[+-]?[0-9]+", plain):
            # more digits than any limit has: as a float it is large enough to be refused
            return self.check(int(plain) if len(plain) < 100 else float(plain))
        try:
            number = math.nan if "_" in plain else float(plain)
        except ValueError:
            number = math.nan
        if math.isnan(number) and plain.lower().lstrip("+-") != "nan":
            raise ValueError(f"{text!r} is no number; give {self.words}")
        return self.check(number)


COUNT = Kind("a whole number from 1 to 1000000", low=1, high=10**6, whole=True)
COUNT_OR_NONE = Kind("a whole number from 0 to 1000000", low=0, high=10**6, whole=True)
CONTEXT = Kind("a whole number of tokens from 16 to 100000000", low=16, high=10**8, whole=True)
TOKENS = Kind("a whole number of tokens from 1 to 100000000", low=1, high=10**8, whole=True)
DEPTH = Kind("a whole number of tokens from 0 to 100000000", low=0, high=10**8, whole=True)
SEQUENCES = Kind("a whole number of sequences from 1 to 256", low=1, high=256, whole=True)
DRAFT = Kind("a whole number of tokens from 1 to 512", low=1, high=512, whole=True)
THREADS = Kind("a whole number of threads from 1 to 4096", low=1, high=4096, whole=True)
SECONDS = Kind("seconds, more than 0", above=0, high=1e9)
GIB = Kind("GiB, more than 0", above=0, high=1e9)
PERPLEXITY = Kind("a perplexity, more than 0", above=0)
PERCENT = Kind("a percentage, e.g. 3", low=-100)
PERCENT_UP = Kind("a percentage from 0 up", low=0)
MARGIN = Kind("a percentage above 0", above=0, high=1e6)
SHARE_PCT = Kind("a percentage from 0 to 100", low=0, high=100)
FRACTION = Kind("a fraction from 0 to 1", low=0, high=1)
NATS = Kind("nats, 0 or more", low=0)

AUTO: Literal["auto"] = "auto"
WINDOW = Kind("auto or a whole number of tokens from 0 to 1000000", low=0, high=10**6, whole=True)


def _or_auto(value: object) -> Any:
    return value if value == AUTO else WINDOW.check(value)


# The same as fields of a validated model.
Count = Annotated[int, BeforeValidator(COUNT.check)]
Context = Annotated[int, BeforeValidator(CONTEXT.check)]
Tokens = Annotated[int, BeforeValidator(TOKENS.check)]
Threads = Annotated[int, BeforeValidator(THREADS.check)]
Seconds = Annotated[float, BeforeValidator(SECONDS.check)]
Perplexity = Annotated[float, BeforeValidator(PERPLEXITY.check)]
Percent = Annotated[float, BeforeValidator(PERCENT.check)]
PositivePercent = Annotated[float, BeforeValidator(PERCENT_UP.check)]
Margin = Annotated[float, BeforeValidator(MARGIN.check)]
SharePct = Annotated[float, BeforeValidator(SHARE_PCT.check)]
Fraction = Annotated[float, BeforeValidator(FRACTION.check)]
WholeTokens = Annotated[int, BeforeValidator(DEPTH.check)]
TokensOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_or_auto)]
Nats = Annotated[float, BeforeValidator(NATS.check)]


def read(name: str, text: str, kind: Kind) -> float:
    """What the option or variable `name` was given.

    Raises:
        UsageError: it is no number of that kind; says the place and the reason.
    """
    try:
        return kind.parse(text)
    except ValueError as error:
        reason, _, step = str(error).partition("; ")
        raise UsageError(f"{name}: {reason}", step) from None


def option(name: str, kind: Kind) -> Callable[[Any], Any]:
    """The same as typer's `parser=`: it is called with the text given, or with the default."""

    def parse(value: Any) -> Any:
        return read(name, value if isinstance(value, str) else repr(value), kind)

    return parse


def percent(name: str, kind: Kind = PERCENT) -> Callable[[Any], Any]:
    """A parser of "3%", "3 %" and "3"."""

    def parse(value: Any) -> Any:
        return read(name, str(value).strip().removesuffix("%"), kind)

    return parse


def tokens_or_auto(name: str, text: str) -> list[TokensOrAuto]:
    """The items of a comma-separated option: "auto" or tokens.

    Raises:
        UsageError: as `read`, or there is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"{name}: {text!r} holds no number", f"give {WINDOW.words}")
    return [AUTO if part == AUTO else int(read(name, part, WINDOW)) for part in parts]


def several(name: str, text: str, kind: Kind) -> list[float]:
    """The numbers of a comma-separated option.

    Raises:
        UsageError: as `read`, or there is none.
    """
    found = [read(name, part, kind) for part in text.split(",") if part.strip()]
    if not found:
        raise UsageError(f"{name}: {text!r} holds no number", f"give {kind.words}")
    return found
