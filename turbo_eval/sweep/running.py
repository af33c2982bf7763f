"""What can be said while a sweep runs: the change of perplexity so far, and the time left."""

from __future__ import annotations

import math

from turbo_eval.evidence.paired import Interval, interval


class RunningDelta:
    """ΔPPL of one cell from running perplexities, which is what llama.cpp prints.

    The share of chunk n is n times the running mean of ln(PPL / PPL of f16/f16) less the shares before it, so
    the interval is that of the finished table but for the digits that are printed. It holds for this number
    of chunks alone: to end a run by looking at it would make it too narrow (`sweep --until-decided` does that
    right).
    """

    def __init__(self) -> None:
        self._shares: list[float] = []

    def add(self, chunk: int, ppl: float, base: float) -> Interval | None:
        """After `chunk` chunks, counted from 1, with the perplexities of the cell and of f16/f16 over them.

        Where chunks were missed their spread is not known: the interval is infinite. None: no numbers.
        """
        if not (0 < ppl < math.inf and 0 < base < math.inf):
            return None
        mean = math.log(ppl / base)
        if chunk != len(self._shares) + 1:
            return interval([mean]).percent()
        self._shares.append(chunk * mean - sum(self._shares))
        return interval(self._shares).percent()


class TimeLeft:
    """Time left of a sweep from the share of its work that is done.

    Work is in any unit, as the plan estimates it; what is found on record is taken off the whole.
    """

    def __init__(self, work: dict[int, float], now: float) -> None:
        self._work = dict(work)
        self._share: dict[int, float] = dict.fromkeys(work, 0.0)
        self._began = now

    def advance(self, number: int, share: float) -> None:
        """That share of a cell is done, from 0 to 1; a cell that runs again may fall back."""
        if number in self._share:
            self._share[number] = min(max(share, 0.0), 1.0)

    def skip(self, number: int) -> None:
        """The cell need not be measured."""
        self._work.pop(number, None)
        self._share.pop(number, None)

    def seconds(self, now: float) -> float:
        """Of what is left, at the pace so far; before anything is done the plan's own estimate."""
        whole = sum(self._work.values())
        done = sum(self._work[number] * share for number, share in self._share.items())
        if done <= 0 or whole <= 0:
            return whole
        return (now - self._began) * (whole - done) / done


def words_of_delta(found: Interval) -> str:
    """ "ΔPPL +0.53 (−0.21 … +1.27) %"; the interval, of 95 %, is left out with one chunk."""
    interval = f" ({found.low:+.2f} … {found.high:+.2f})" if math.isfinite(found.high) else ""
    return f"ΔPPL {found.value:+.2f}{interval} %".replace("-", "−")


def words_of_time(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
