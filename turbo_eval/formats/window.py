"""The exact window: the newest and the first tokens of a sequence, kept beside a quantized cache.

Keys and values of the last `recent` tokens before a query, and of the first `first` tokens of its sequence,
are taken from a copy in 8 or 16 bits; all others from the quantized cache (docs/explanation/exact-window.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from turbo_eval.formats.cache_types import cache_type
from turbo_eval.util.numbers import AUTO, TokensOrAuto

# llama.cpp's own defaults in a build that has the window, for a pair with a type below 8 bits per value
AUTO_RECENT, AUTO_FIRST = 128, 4


@dataclass(frozen=True)
class Window:
    """Sizes in tokens; 0 and 0: no window."""

    recent: int = 0
    first: int = 0

    def __bool__(self) -> bool:
        return bool(self.recent or self.first)

    def __str__(self) -> str:
        """ "128+4", or "off"."""
        return f"{self.recent}+{self.first}" if self else "off"


OFF = Window()
DEFAULT = Window(AUTO_RECENT, AUTO_FIRST)


def resolve(recent: TokensOrAuto, first: TokensOrAuto, k: str, v: str) -> Window:
    """What is asked for, for a pair: a pair whose types both have 8 bits or more is exact enough as it is.

    Args:
        recent, first: tokens, or "auto": 128 and 4; no first tokens without recent ones, unless asked for.
    """
    if min(cache_type(k).bpv, cache_type(v).bpv) >= 8:
        return OFF
    return sized(recent, first)


def sized(recent: TokensOrAuto, first: TokensOrAuto) -> Window:
    """The same beside a pair that has a window."""
    newest = AUTO_RECENT if recent == AUTO else int(recent)
    if first == AUTO:
        return Window(newest, AUTO_FIRST if newest else 0)
    return Window(newest, int(first))
