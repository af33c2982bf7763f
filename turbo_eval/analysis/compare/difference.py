"""One cell on two sides: each number's difference, its uncertainty and the odds of it being noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbo_eval.analysis.compare.match import Entry, facts
from turbo_eval.analysis.statistics import chunk_error, delta_pct, normal_p, student_p, unpaired_error
from turbo_eval.evidence import paired as tests
from turbo_eval.evidence.paired import Decision
from turbo_eval.records.pairing import MARGIN, Paired
from turbo_eval.records.record import Record
from turbo_eval.records.speed import BenchRecord

# llama-perplexity prints PPL with four decimals and KLD with six: two roundings.
_RESOLUTION = {"PPL": 1.5e-4, "KLD": 1.5e-6, "same top %": 1.5e-3}


@dataclass(frozen=True)
class Difference:
    """One quantity of one cell on both sides.

    `delta` is b/a − 1 in percent for PPL and speeds, b − a for the rest; `error` its standard error
    (`paired`: from the differences of single chunks; else from the two errors, which overstates it on a
    common text). `p` is the chance of a difference this large from noise alone. `status_a` and `status_b`
    are "ok" where there are numbers. `verdict` is that of the paired test on a change of perplexity, where
    both sides have figures of each token.
    """

    what: str
    of_a: Entry
    of_b: Entry
    a: float | None
    b: float | None
    delta: float | None = None
    error: float | None = None
    paired: bool = False
    p: float = 1.0
    verdict: Decision | None = None
    status_a: str = "ok"
    status_b: str = "ok"

    @property
    def model(self) -> str:
        """Model by name, as side A calls it."""
        return facts(self.of_a)["model name"]

    @property
    def ctx(self) -> str:
        """Context in tokens; for speed the depth, the sequences at once, or the tokens of a draft."""
        return self.of_a.load if isinstance(self.of_a, BenchRecord) else facts(self.of_a)["ctx"]

    @property
    def is_speed(self) -> bool:
        """A speed, not a quality."""
        return isinstance(self.of_a, BenchRecord)

    @property
    def k(self) -> str:
        """K's type; "a→b" where the sides differ in it."""
        return self._type("k")

    @property
    def v(self) -> str:
        """V's type, like `k`."""
        return self._type("v")

    def _type(self, side: str) -> str:
        a, b = facts(self.of_a)[side], facts(self.of_b)[side]
        return a if a == b else f"{a}→{b}"

    @property
    def pair(self) -> str:
        """ "K:V"."""
        return f"{self.k}:{self.v}"

    def beyond_noise(self, alpha: float) -> bool:
        """Whether the sides differ: in status, or in a number by more than printing and chance explain."""
        if self.status_a != self.status_b:
            return True
        if self.a is None or self.b is None or abs(self.b - self.a) <= _RESOLUTION.get(self.what, 0.0):
            return False
        return self.p < alpha


def differences(a: Record, b: Record) -> list[Difference]:
    """Every number of a cell of quality, or the two states if one side failed."""

    def made(what: str, **values: Any) -> Difference:
        return Difference(what=what, of_a=a, of_b=b, **values)

    if not (a.ok and b.ok):
        return [made(a.cell.metric, a=a.ppl, b=b.ppl, status_a=a.status, status_b=b.status)]
    found = []
    if a.ppl and b.ppl:
        delta, error, paired, p = _ppl_difference(a, b)
        values = {"delta": delta, "error": error, "paired": paired, "p": p}
        found.append(made("PPL", a=a.ppl, b=b.ppl, verdict=_verdict(a, b), **values))
    for what, x, y, x_err, y_err in _others(a, b):
        if what == "KLD" and (apart := _apart(a, b, "kld")) is not None:
            p, error = tests.p_difference(apart), tests.interval(apart).error
            values = {"delta": y - x, "error": error if error == error else None, "paired": True}
            found.append(made(what, a=x, b=y, p=p if len(apart) > 1 else 1.0, **values))
            continue
        error = math.hypot(x_err, y_err) if x_err is not None and y_err is not None else None
        p = 1.0 if x == y else normal_p((y - x) / error) if error else 0.0
        found.append(made(what, a=x, b=y, delta=y - x, error=error, p=p))
    return found


def _apart(a: Record, b: Record, what: str) -> list[float] | None:
    """b - a of each chunk; None where one has no figures of each token of the same text."""
    if a.by_chunk is None or b.by_chunk is None or len(a.by_chunk.nll) != len(b.by_chunk.nll):
        return None
    return [y - x for x, y in zip(getattr(a.by_chunk, what), getattr(b.by_chunk, what), strict=True)]


def _verdict(a: Record, b: Record) -> Decision | None:
    log_ratio = _apart(a, b, "nll")
    if log_ratio is None or a.by_chunk is None or b.by_chunk is None:
        return None
    return Paired(tuple(log_ratio), a.by_chunk.sequential or b.by_chunk.sequential).decide(MARGIN)


def speed_differences(a: BenchRecord, b: BenchRecord) -> list[Difference]:
    """Speeds as shares of f16's in the same rounds: what a machine does to both is no difference."""
    if a.status != "ok" or b.status != "ok":
        return [Difference("speed", a, b, None, None, status_a=a.status, status_b=b.status)]
    found = []
    for what, x, y in (
        ("prefill / f16", _shares_of_f16(a.prefill, a.prefill_f16), _shares_of_f16(b.prefill, b.prefill_f16)),
        ("decode / f16", _shares_of_f16(a.decode, a.decode_f16), _shares_of_f16(b.decode, b.decode_f16)),
    ):
        if not (len(x) and len(y)):
            continue
        delta = float(y.mean() - x.mean())
        error, p = _welch(x, y)
        found.append(
            Difference(
                what,
                of_a=a,
                of_b=b,
                a=math.exp(x.mean()),
                b=math.exp(y.mean()),
                delta=100 * math.expm1(delta),
                error=None if error is None else 100 * error,
                p=1.0 if delta == 0 else p,
            )
        )
    return found


def _shares_of_f16(own: Sequence[float], f16: Sequence[float]) -> NDArray[np.float64]:
    """Log of the ratio in each round."""
    return np.log([x / y for x, y in zip(own, f16, strict=False) if x > 0 and y > 0])


def _welch(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float | None, float]:
    """(standard error of the difference of means, p); one round tells nothing about its noise."""
    if len(x) < 2 or len(y) < 2:
        return None, 1.0
    u, w = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    if u + w == 0:
        return 0.0, 0.0
    freedom = (u + w) ** 2 / (u**2 / (len(x) - 1) + w**2 / (len(y) - 1))
    return math.sqrt(u + w), student_p((y.mean() - x.mean()) / math.sqrt(u + w), freedom)


_Other = tuple[str, float, float, float | None, float | None]


def _others(a: Record, b: Record) -> list[_Other]:
    """(what, a, b, standard error of a, of b) of everything beside perplexity."""
    found: list[_Other] = []
    if a.kld and b.kld:
        x, y = a.kld, b.kld
        found.append(("KLD", x.mean, y.mean, x.mean_err, y.mean_err))
        found.append(("same top %", x.same_top_pct, y.same_top_pct, x.same_top_pct_err, y.same_top_pct_err))
    if a.greedy and b.greedy:
        tokens = a.greedy.tokens  # of all prompts together
        found.append(_shares("greedy same %", a.greedy.agree_pct, b.greedy.agree_pct, tokens))
    if a.needle and b.needle:
        x_pct, y_pct = (100 * n.hits / max(1, n.probes) for n in (a.needle, b.needle))
        found.append(_shares("needle %", x_pct, y_pct, a.needle.probes))
    return found


def _shares(what: str, a: float, b: float, n: int) -> _Other:
    return what, a, b, _share_error(a, n), _share_error(b, n)


def _share_error(percent: float, n: int) -> float:
    # One more of each kind, so that 100 % of few is not certainty.
    share = (percent / 100 * n + 1) / (n + 2)
    return 100 * math.sqrt(share * (1 - share) / (n + 2))


def _ppl_difference(a: Record, b: Record) -> tuple[float, float | None, bool, float]:
    """(percent, its standard error, paired, p). Chunks are the units: tokens of a chunk hang together.

    Few chunks say little about their own scatter; then the two printed errors, which bound it from
    above on a common text, may still be enough.
    """
    assert a.ppl and b.ppl
    if a.ppl == b.ppl:
        return 0.0, 0.0, True, 1.0
    ratio = b.ppl / a.ppl
    delta = math.log(ratio)
    unpaired = unpaired_error(a, b)
    p = normal_p(delta / unpaired) if unpaired else 1.0
    error, paired = (None if unpaired is None else 100 * ratio * unpaired), False
    by_chunk = chunk_error(b, a)
    if by_chunk is not None:
        error, paired = 100 * ratio * by_chunk, True
        p = min(p, student_p(delta / by_chunk, len(a.running_ppl) - 1) if by_chunk else 0.0)
    return delta_pct(b.ppl, a.ppl), error, paired, p
