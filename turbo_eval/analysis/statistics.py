"""Differences of perplexities with their errors. All commands take theirs from here, so that they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from turbo_eval.evidence import paired
from turbo_eval.records.pairing import ERROR_RATE, Paired
from turbo_eval.records.record import Record

_MANY = 1000  # degrees of freedom of an error over tokens: as good as normal


@dataclass(frozen=True)
class Delta:
    """PPL / PPL(reference) − 1 in percent, and its standard error in percent where it can be told.

    `paired`: from the same tokens or chunks of both runs; else from the two printed errors, which overstates
    it on a common text. `df`: degrees of freedom of that error.
    """

    pct: float
    err_pct: float | None
    paired: bool
    df: int


def delta_pct(ppl: float, reference: float) -> float:
    """Difference of two perplexities in percent of the second."""
    return 100 * (ppl / reference - 1)


def delta_ppl(record: Record, reference: Record, paired_err: float | None = None) -> Delta | None:
    """How far a record's perplexity is from its reference's; None without two perplexities.

    Args:
        paired_err: standard error of PPL / PPL(f16) over the same tokens, where a KL run printed it.
    """
    if record.ppl is None or reference.ppl is None or min(record.ppl, reference.ppl) <= 0:
        return None
    pct = delta_pct(record.ppl, reference.ppl)
    if not math.isfinite(pct):
        return None
    if record.key == reference.key:
        return Delta(pct, 0.0, True, _MANY)
    if paired_err is not None:
        return Delta(pct, 100 * paired_err, True, _MANY)
    ratio = record.ppl / reference.ppl
    by_chunk = chunk_error(record, reference)
    if by_chunk is not None:
        return Delta(pct, 100 * ratio * by_chunk, True, len(record.running_ppl) - 1)
    apart = unpaired_error(record, reference)
    return Delta(pct, None if apart is None else 100 * ratio * apart, False, _MANY)


def unpaired_error(a: Record, b: Record) -> float | None:
    """Standard error of ln(PPL of a / PPL of b) from the two printed errors; None where one is missing."""
    if not (a.ppl and b.ppl and a.ppl_err is not None and b.ppl_err is not None):
        return None
    return math.hypot(a.ppl_err / a.ppl, b.ppl_err / b.ppl)


def chunk_error(a: Record, b: Record) -> float | None:
    """Standard error of ln(PPL of a / PPL of b) from the differences of single chunks; None with fewer than
    two. Chunks are the units: tokens of a chunk hang together."""
    n = len(a.running_ppl)
    if n < 2 or n != len(b.running_ppl):
        return None
    return float((chunk_nll(a) - chunk_nll(b)).std(ddof=1)) / math.sqrt(n)


def chunk_nll(record: Record) -> NDArray[np.float64]:
    """Mean negative log likelihood of each chunk, in nats, out of the running perplexity."""
    sums = np.log(np.array(record.running_ppl)) * np.arange(1, len(record.running_ppl) + 1)
    return np.diff(sums, prepend=0.0)


def normal_p(z: float) -> float:
    """Chance of a deviation of at least `z` standard errors, both sides."""
    return math.erfc(abs(z) / math.sqrt(2))


def student_p(t: float, df: float) -> float:
    """As `normal_p` with `df` degrees of freedom, by the trapezoid rule over the angle, where the density is
    smooth and bounded."""
    if df > 1000:
        return normal_p(t)
    angle = np.linspace(math.atan(abs(t) / math.sqrt(df)), math.pi / 2, 20_001)
    density = np.cos(angle) ** (df - 1)
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return min(1.0, float(2 * norm * np.trapezoid(density, angle)))


# One in twenty: the chance of calling noise a difference that a single comparison may take.
DOUBT = 0.05


def decided(gap: float, error: float | None, df: int = _MANY) -> bool:
    """Is a figure certainly on the side of its limit where it lies? `gap`: its distance from the limit."""
    if error is None or not math.isfinite(error):
        return False
    if error == 0:
        return True
    return student_p(gap / error, max(1, df)) < DOUBT


MOST_CHUNKS = 100_000


def chunks_to_decide(gap: float, error: float, chunks: int) -> int | None:
    """How many chunks more would decide a figure `gap` away from its limit, if figure and scatter stay as
    they are; None: too many to be worth it. Errors shrink with the root of the length."""
    if not abs(gap) * math.sqrt(MOST_CHUNKS) > 2 * error:  # also where one of them is not finite
        return None
    more = math.ceil(chunks * (2 * error / gap) ** 2) - chunks
    return max(1, more) if more <= MOST_CHUNKS else None


def table_verdicts(pairs: Sequence[Paired], margin_pct: float) -> list[paired.Decision]:
    """The verdicts of a whole table: all of them together are right with probability 1 - ERROR_RATE (Holm).

    Each pair makes at most one claim: equivalent, or worse or better, which are tested together. Pairs that
    were measured until decided have verdicts of their own, each with that error rate.
    """
    together = [pair for pair in pairs if not pair.sequential]
    adjusted = dict(
        zip(map(id, together), paired.holm([_p_claim(x, margin_pct) for x in together]), strict=True)
    )
    found = []
    for pair in pairs:
        if pair.sequential:
            found.append(pair.decide(margin_pct))
            continue
        alone, strict = (pair.decide(margin_pct, a) for a in (ERROR_RATE, ERROR_RATE / len(together)))
        if adjusted[id(pair)] > ERROR_RATE:
            more = strict.more_chunks if strict.verdict == "undecided" else 1
            alone = replace(alone, verdict="undecided", more_chunks=more)
        found.append(alone)
    return found


def _p_claim(pair: Paired, margin_pct: float) -> float:
    """p-value of what the figures speak for."""
    if len(pair.log_ratio) < 2:
        return 1.0
    equivalent = paired.p_equivalent(pair.log_ratio, margin_pct)
    return min(equivalent, 1.0, 2 * (1 - equivalent))
