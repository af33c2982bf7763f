"""Paired statistics of two KV caches that scored the same tokens. Pure: arrays in, verdicts out.

Figures come per token and are summed up per chunk. Tokens of one chunk share their context, so the chunk,
not the token, counts as one observation: errors are those of the mean over chunk means, with Student's t for
their number ("clustered by chunk"). Where tokens are independent this costs a little width at few chunks and
nothing at many; where they are not, as those of KL divergences, an error over tokens would be too small.

Margins are given in percent of perplexity and tested on its logarithm, the mean difference of the negative
log-likelihoods: ln(PPL / PPL of the reference).

Sources: two one-sided tests (Schuirmann 1987); McNemar's test, exact (Fagerland et al. 2013); Holm (1979);
the confidence sequence inverts the e-process of the t-test with a normal prior on the effect size (Lai 1976;
Pérez-Ortiz, Lardy, de Heide, Grünwald 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from turbo_eval.errors import UsageError

Verdict = Literal["equivalent", "worse", "better", "undecided"]
Floats = NDArray[np.float64]

# Variance of the prior on the effect size (mean / standard deviation of a chunk) in the confidence sequence.
# Any positive value keeps its promise; this one makes it tight from about 8 chunks on.
_PRIOR = 0.5
_MOST_CHUNKS = 10**7


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval; infinite where one chunk says nothing about the spread.
        error: standard error of `value`; NaN with one chunk.
        level: coverage, e.g. 0.95.
        chunks: observations behind it.
    """

    value: float
    low: float
    high: float
    error: float
    level: float
    chunks: int

    def percent(self) -> Interval:
        """A logarithm of a ratio as a change in percent: 0.01 → 1.005 %."""
        return Interval(
            100 * math.expm1(self.value),
            _percent(self.low),
            _percent(self.high),
            100 * math.exp(self.value) * self.error,
            self.level,
            self.chunks,
        )


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio) if log_ratio < 700 else math.inf


@dataclass(frozen=True)
class Scores:
    """What a cache did on the scored tokens, one row a chunk.

    Attributes:
        nll: negative log-likelihood of the true token, nats, (chunks, tokens).
        top: the most probable token, (chunks, tokens).
        token: the true token, (chunks, tokens).
    """

    nll: Floats
    top: NDArray[np.uint32]
    token: NDArray[np.uint32]


@dataclass(frozen=True)
class Flips:
    """Tokens that one of two caches predicts (its most probable token is the true one) and the other doesn't.

    Attributes:
        lost: right with the reference, wrong with the pair.
        won: the other way round.
        tokens: how many were compared.
        p_value: McNemar's exact test of lost = won, two-sided.
    """

    lost: int
    won: int
    tokens: int
    p_value: float


def chunk_means(values: ArrayLike) -> Floats:
    """Mean of each chunk.

    Args:
        values: (chunks, tokens).

    Raises:
        UsageError: no chunk, no token, or a value that is not finite: never averaged away.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"per-token figures of shape {array.shape} hold no chunks of tokens")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        chunk, token = bad[0]
        raise UsageError(
            f"{len(bad)} per-token figures are not finite, the first in chunk {chunk}, token {token}"
        )
    means: Floats = array.mean(axis=1)
    return means


def interval(per_chunk: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of the mean over chunks.

    Args:
        per_chunk: one figure a chunk.
        level: coverage, between 0 and 1.
    """
    x, mean, error = _summary(per_chunk)
    _check_share("confidence level", level)
    if len(x) < 2:
        return Interval(mean, -math.inf, math.inf, math.nan, level, len(x))
    half = _t_quantile((1 + level) / 2, len(x)) * error
    return Interval(mean, mean - half, mean + half, error, level, len(x))


def sequence(per_chunk: ArrayLike, level: float = 0.95) -> Interval:
    """Confidence sequence: with probability `level` it holds the mean at every number of chunks at once.

    So it may be looked at after each chunk, and the run ended when it says enough. Exact for independent
    normal chunk means of any variance. Wider than `interval` at any single look.

    Args:
        per_chunk: one figure a chunk, in the order in which they were measured.
        level: coverage over all looks together.
    """
    x, mean, error = _summary(per_chunk)
    _check_share("confidence level", level)
    width = _sequence_width(len(x), level)
    alike = len(x) > 1 and not x.any()  # a pair that differs in nothing needs no chunk more
    half = 0.0 if alike else width * error if math.isfinite(width) else math.inf
    return Interval(mean, mean - half, mean + half, error if len(x) > 1 else math.nan, level, len(x))


def _sequence_width(n: int, level: float) -> float:
    """Half the width of the confidence sequence after n chunks, in standard errors.

    With r = 1 + n·prior the e-value of "the mean is m", t standard errors away, is
    r^(-1/2) · ((1 + t²/(n-1)) / (1 + t²/(r(n-1))))^(n/2); the sequence holds every m of which it is below
    1/(1 - level).
    """
    if n < 2:
        return math.inf
    r = 1 + n * _PRIOR
    limit = 2 / n * (0.5 * math.log(r) - math.log(1 - level))
    if limit >= math.log(r):  # below the largest value that it can take: nothing is excluded yet
        return math.inf
    c = math.exp(limit)
    return math.sqrt((n - 1) * (c - 1) / (1 - c / r))


def _t_quantile(share: float, n: int) -> float:
    """Of Student's t for the mean of n observations."""
    return float(special.stdtrit(n - 1, share))


def _t_tail(t: float, n: int) -> float:
    """Probability of more than t."""
    return float(special.stdtr(n - 1, -t))


def _summary(per_chunk: ArrayLike) -> tuple[Floats, float, float]:
    x = np.asarray(per_chunk, dtype=np.float64).ravel()
    if not len(x):
        raise UsageError("there is no chunk to take a mean of")
    if not np.isfinite(x).all():
        raise UsageError(
            f"{int((~np.isfinite(x)).sum())} of {len(x)} chunks are not finite: they have no mean"
        )
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return x, float(x.mean()), error


def _check_share(what: str, value: float) -> None:
    if not 0 < value < 1:  # NaN too
        raise UsageError(f"a {what} of {value} is not between 0 and 1")


def _check_margin(percent: float) -> float:
    if isinstance(percent, bool) or not math.isfinite(percent) or percent <= 0:
        raise UsageError(f"a margin of {percent} % is not a positive number")
    return math.log1p(percent / 100)


def log_ratio(pair: Scores, reference: Scores) -> Floats:
    """ln(PPL / PPL of the reference) of each chunk: mean difference of the negative log-likelihoods.

    Raises:
        UsageError: the two did not score the same tokens.
    """
    if pair.token.shape != reference.token.shape or not np.array_equal(pair.token, reference.token):
        raise UsageError("the two caches did not score the same tokens", "evaluate both on the same chunks")
    return chunk_means(np.asarray(pair.nll, dtype=np.float64) - np.asarray(reference.nll, dtype=np.float64))


def delta_ppl(pair: Scores, reference: Scores, level: float = 0.95) -> Interval:
    """Change of perplexity against the reference in percent."""
    return interval(log_ratio(pair, reference), level).percent()


def kl_divergence(kld: ArrayLike, level: float = 0.95) -> Interval:
    """Mean KL divergence. Its interval is symmetric in the logarithm, as a positive, skewed figure asks for.

    Args:
        kld: per token, nats, (chunks, tokens). Rounding may leave values a little below 0.
    """
    mean = interval(chunk_means(kld), level)
    if mean.value <= 0 or not mean.error > 0:
        return mean
    factor = math.exp((mean.high - mean.value) / mean.value)
    return Interval(mean.value, mean.value / factor, mean.value * factor, mean.error, level, mean.chunks)


def same_top(pair: Scores, reference: Scores, level: float = 0.95) -> Interval:
    """Share of tokens on which both find the same token most probable, 0 to 1.

    Where both agree on every token (or none) the chunks have no spread: the interval is then the exact one
    for as many independent tokens (Clopper and Pearson).
    """
    same = pair.top == reference.top
    share = interval(chunk_means(same), level)
    if share.error == 0 and share.value in (0.0, 1.0):
        exact = stats.binomtest(int(same.sum()), same.size).proportion_ci(level)
        return Interval(share.value, float(exact.low), float(exact.high), 0.0, level, share.chunks)
    return Interval(
        share.value, max(share.low, 0.0), min(share.high, 1.0), share.error, share.level, share.chunks
    )


def flips(pair: Scores, reference: Scores) -> Flips:
    """Count right → wrong and wrong → right over the true tokens."""
    before = reference.top == reference.token
    after = pair.top == pair.token
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return Flips(lost, won, int(before.size), mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of "as often lost as won", for paired yes/no outcomes: needles, tasks, tokens.

    The outcomes must be independent of one another: one a prompt.
    """
    return 1.0 if lost + won == 0 else float(stats.binomtest(lost, lost + won).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: all those at or below α together err with probability α at most.

    Args:
        p_values: one a comparison, e.g. a cell of a K × V table.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise UsageError(f"{p} is no p-value")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def p_difference(per_chunk: ArrayLike) -> float:
    """Two-sided p-value of "the mean over chunks is 0" (t-test); 1 for chunks that are all 0."""
    x, mean, error = _summary(per_chunk)
    if error == 0:
        return 1.0 if mean == 0 or len(x) < 2 else 0.0
    return 2 * _t_tail(abs(mean) / error, len(x))


def p_equivalent(per_chunk: ArrayLike, margin_pct: float) -> float:
    """p-value of the two one-sided tests: small means |ΔPPL| is below the margin.

    Args:
        per_chunk: `log_ratio`.
        margin_pct: in percent of perplexity.
    """
    margin = _check_margin(margin_pct)
    x, mean, error = _summary(per_chunk)
    if len(x) < 2:
        return 1.0
    gap = margin - abs(mean)
    if error == 0:
        return 0.0 if gap > 0 else 1.0
    return _t_tail(gap / error, len(x))


@dataclass(frozen=True)
class Decision:
    """A verdict on ΔPPL against a margin.

    Attributes:
        verdict: "equivalent": |ΔPPL| is below the margin; "worse": ΔPPL is above it; "better": below minus
            the margin; "undecided": the chunks do not say.
        delta: ΔPPL in percent, with the interval that the verdict was read from.
        margin_pct: the margin.
        more_chunks: for "undecided", about how many more chunks would decide if mean and spread stay as they
            are; None if no number would, because ΔPPL lies on the margin.
    """

    verdict: Verdict
    delta: Interval
    margin_pct: float
    more_chunks: int | None = None

    def __str__(self) -> str:
        if self.verdict != "undecided":
            return self.verdict
        if self.more_chunks is None:
            return "undecided (at the margin)"
        return f"undecided ({self.more_chunks} more chunk{'s' if self.more_chunks > 1 else ''})"


def decide(
    per_chunk: ArrayLike, margin_pct: float, alpha: float = 0.05, *, sequential: bool = False
) -> Decision:
    """Judge a pair by its change of perplexity.

    Each wrong verdict ("equivalent" beyond the margin, "worse" or "better" within it) has a probability of
    `alpha` at most. One look: the interval of level 1 - 2·alpha, which is the two one-sided tests.
    `sequential`: the confidence sequence of level 1 - alpha; the bound then holds for all looks together.

    Args:
        per_chunk: `log_ratio`, in the order of measurement.
        margin_pct: what counts as a difference, in percent of perplexity.
        alpha: error rate.
        sequential: the chunks are looked at repeatedly, and more are added as long as it is undecided.
    """
    margin = _check_margin(margin_pct)
    _check_share("error rate", alpha)
    log = sequence(per_chunk, 1 - alpha) if sequential else interval(per_chunk, 1 - 2 * alpha)
    verdict: Verdict = "undecided"
    if log.chunks > 1:
        if -margin < log.low and log.high < margin:
            verdict = "equivalent"
        elif log.low > margin:
            verdict = "worse"
        elif log.high < -margin:
            verdict = "better"
    more = _more_chunks(log, margin, alpha, sequential) if verdict == "undecided" else None
    return Decision(verdict, log.percent(), margin_pct, more)


def _more_chunks(log: Interval, margin: float, alpha: float, sequential: bool) -> int | None:
    """Fewest chunks to add until the half-width is below the distance of the mean from the margin."""
    distance = abs(margin - abs(log.value))
    if not log.error > 0 or distance == 0:
        return 1 if log.chunks < 2 else None
    spread = log.error * math.sqrt(log.chunks)

    def decided(n: int) -> bool:
        width = _sequence_width(n, 1 - alpha) if sequential else _t_quantile(1 - alpha, n)
        return width * spread / math.sqrt(n) < distance

    high = max(log.chunks + 1, 2)
    while not decided(high):
        high *= 2
        if high > _MOST_CHUNKS:
            return None
    low = log.chunks
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle > 1 and decided(middle) else (middle, high)
    return high - log.chunks
