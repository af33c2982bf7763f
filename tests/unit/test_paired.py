"""The tests say what they claim, on real per-token figures: tests/data/kv-eval."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from turbo_eval.errors import UsageError
from turbo_eval.evidence import paired as st

DATA = Path(__file__).parent.parent / "data" / "kv-eval" / "smollm2-135m.npz"
PAIRS = ("q8_0:q8_0", "q4_0:q4_0", "turbo3:turbo3")
RUNS = 2000
ALPHA = 0.05
# What 2000 runs may show of a rate that is truly 5 %: three standard errors more.
AT_MOST = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)

Floats = NDArray[np.float64]


def of(pair: str, column: str) -> Floats:
    """(chunks, tokens) of "delta" (nll minus the reference's), "kld" or "same" (top token)."""
    with np.load(DATA) as file:
        if column == "same":
            return np.asarray(file[f"{pair}.top"] == file["reference.top"], dtype=np.float64)
        return np.asarray(file[f"{pair}.{column}"], dtype=np.float64)


def scores(pair: str | None) -> st.Scores:
    with np.load(DATA) as file:
        name = pair or "reference"
        nll = file["reference.nll"].astype(np.float64)
        if pair:
            nll = nll + file[f"{pair}.delta"].astype(np.float64)
        return st.Scores(nll, file[f"{name}.top"].astype(np.uint32), file["token"].astype(np.uint32))


def resampled(values: Floats, chunks: int, runs: int = RUNS, seed: int = 0) -> Floats:
    """Chunk means of `runs` texts of `chunks` chunks each, drawn from the real chunks: (runs, chunks)."""
    rng = np.random.default_rng(seed)
    means: Floats = st.chunk_means(values)
    drawn: Floats = rng.choice(means, size=(runs, chunks))
    return drawn


def planted(pair: str, percent: float) -> Floats:
    """The differences of a pair, moved so that its true ΔPPL is `percent`."""
    values = of(pair, "delta")
    moved: Floats = values - values.mean() + math.log1p(percent / 100)
    return moved


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("column", ["delta", "kld", "same"])
@pytest.mark.parametrize("chunks", [8, 16, 32])
def test_intervals_hold_the_truth_as_often_as_they_say(pair: str, column: str, chunks: int) -> None:
    values = of(pair, column)
    truth = values.mean()

    def holds(means: Floats) -> bool:
        got = st.kl_divergence(means[:, None]) if column == "kld" else st.interval(means)
        return bool(got.low <= truth <= got.high)

    covered = np.mean([holds(means) for means in resampled(values, chunks)])
    assert 0.925 <= covered <= 0.975


def autocorrelation(values: Floats, lag: int) -> float:
    """Of a per-token figure within its chunks."""
    centred = values - values.mean()
    return float((centred[:, lag:] * centred[:, :-lag]).mean() / (centred**2).mean())


def design_effect(values: Floats) -> float:
    """Variance of the mean with chunks as the unit, over that with tokens as the unit; 1: independent."""
    return float(st.chunk_means(values).var(ddof=1) * values.shape[1] / values.var(ddof=1))


def test_tokens_of_a_chunk_are_not_independent() -> None:
    """Why errors are clustered by chunk: with tokens as the unit some would be half of what they are."""
    effects = {(p, c): design_effect(of(p, c)) for p in PAIRS for c in ("delta", "kld", "same")}
    assert max(effects.values()) > 2
    assert autocorrelation(of("q8_0:q8_0", "kld"), 1) > 0.1
    assert all(abs(autocorrelation(of("q8_0:q8_0", "delta"), lag)) < 0.1 for lag in range(1, 17))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("margin", "chunks"), [(0.5, 16), (0.5, 64), (5.0, 16)])
def test_wrong_verdicts_are_rare(pair: str, margin: float, chunks: int) -> None:
    """At the margin, where they are most likely: "equivalent" and "worse" are both wrong there."""
    means = resampled(planted(pair, margin), chunks)
    found = [st.decide(one, margin).verdict for one in means]
    assert found.count("equivalent") / RUNS <= AT_MOST
    assert found.count("worse") / RUNS <= AT_MOST + 0.01, "one tail of a skewed mean of few chunks"


def looked_at(means: Floats, margin: float, first: int = 2) -> tuple[str, int]:
    """Verdict and chunks it took, looking after every chunk until it is decided or there are no more."""
    for n in range(first, len(means) + 1):
        got = st.decide(means[:n], margin, sequential=True)
        if got.verdict != "undecided":
            return got.verdict, n
    return "undecided", len(means)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_looking_after_every_chunk_keeps_the_error_rate(pair: str, margin: float) -> None:
    """At the margin each verdict is wrong, and there are up to 63 looks."""
    runs = 400
    found = [looked_at(means, margin)[0] for means in resampled(planted(pair, margin), 64, runs)]
    wrong = runs - found.count("undecided")
    assert wrong / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def test_one_look_repeated_would_not_keep_it() -> None:
    """What the confidence sequence is for."""
    runs = 400
    found = [
        any(st.decide(means[:n], 0.5).verdict != "undecided" for n in range(2, 65))
        for means in resampled(planted("q4_0:q4_0", 0.5), 64, runs)
    ]
    assert sum(found) / runs > 0.15


@pytest.mark.parametrize(
    ("percent", "verdict", "chunks"), [(1.0, "worse", 30), (0.1, "equivalent", 45), (-1.0, "better", 30)]
)
def test_planted_differences_are_found(percent: float, verdict: str, chunks: int) -> None:
    """With the noise of q8_0, half of the runs need `chunks` at most. A margin of 0.5 %."""
    runs = [looked_at(means, 0.5) for means in resampled(planted("q8_0:q8_0", percent), 250, 200)]
    assert [name for name, _ in runs].count(verdict) >= 0.95 * len(runs)
    assert np.median([n for _, n in runs]) <= chunks


def test_a_pair_like_the_reference_is_never_worse() -> None:
    """Identical, and with the noise of q8_0 around a true difference of nothing."""
    same = scores(None)
    assert str(st.decide(st.log_ratio(same, same), 0.5)) == "equivalent"
    assert str(st.decide(st.log_ratio(same, same), 0.5, sequential=True)) == "equivalent"
    for means in resampled(planted("q8_0:q8_0", 0.0), 120, 200):
        assert st.decide(means, 0.5).verdict != "worse"
        assert looked_at(means, 0.5)[0] != "worse"


@pytest.mark.parametrize("sequential", [False, True])
def test_as_many_chunks_as_it_says_decide(sequential: bool) -> None:
    """If mean and spread stay as they are."""
    start = 6
    means = st.chunk_means(planted("q8_0:q8_0", 0.1))[:start]
    got = st.decide(means, 0.5, sequential=sequential)
    assert got.verdict == "undecided" and got.more_chunks
    assert str(got) == f"undecided ({got.more_chunks} more chunks)"
    spread = means.std(ddof=1)

    def alike(n: int) -> Floats:
        values = np.resize([1.0, -1.0], n)
        values = (values - values.mean()) / values.std(ddof=1)
        out: Floats = means.mean() + spread * values
        return out

    assert st.decide(alike(start + got.more_chunks), 0.5, sequential=sequential).verdict == "equivalent"
    assert st.decide(alike(start - 1 + got.more_chunks), 0.5, sequential=sequential).verdict == "undecided"


def test_nothing_decides_at_the_margin() -> None:
    got = st.decide([math.log1p(0.005) - 1e-3, math.log1p(0.005) + 1e-3], 0.5)
    assert str(got) in ("undecided (at the margin)",)


def test_figures_of_a_pair() -> None:
    pair, base = scores("q4_0:q4_0"), scores(None)
    delta = st.delta_ppl(pair, base)
    ratio = math.exp(pair.nll.mean() - base.nll.mean())
    assert delta.value == pytest.approx(100 * (ratio - 1)) and delta.low < delta.value < delta.high
    same = st.same_top(pair, base)
    assert same.value == pytest.approx((pair.top == base.top).mean()) and 0 < same.low < same.high < 1
    flips = st.flips(pair, base)
    assert flips.lost > flips.won > 0 and flips.tokens == base.nll.size
    right, now = (base.top == base.token).sum(), (pair.top == pair.token).sum()
    assert right - flips.lost + flips.won == now


def test_agreement_on_every_token_is_not_certainty() -> None:
    base = scores(None)
    same = st.same_top(base, base)
    assert same.value == same.high == 1 and 0.999 < same.low < 1


def test_known_values() -> None:
    assert st.mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert st.mcnemar(0, 0) == 1
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    one = st.interval([1.0, 2.0, 3.0, 4.0])
    assert (one.low, one.high) == pytest.approx(
        (2.5 - 3.18245 * 0.645497, 2.5 + 3.18245 * 0.645497), rel=1e-5
    )
    assert st.p_difference([1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.030466, rel=1e-4)
    assert st.p_equivalent([0.0, 0.001, -0.001], 0.5) == pytest.approx(0.0065, abs=5e-4)
    assert st.p_difference([0.0, 0.0]) == 1 and st.p_equivalent([0.0, 0.0], 0.5) == 0


def test_tost_is_the_interval_of_twice_the_level() -> None:
    for means in resampled(planted("q8_0:q8_0", 0.3), 24, 200):
        assert (st.p_equivalent(means, 0.5) < 0.05) == (st.decide(means, 0.5).verdict == "equivalent")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(UsageError, match="not finite"):
        st.chunk_means([[0.0, bad], [0.0, 0.0]])
    with pytest.raises(UsageError, match="not finite"):
        st.decide([0.0, bad], 0.5)
    with pytest.raises(UsageError, match="margin"):
        st.decide([0.0, 1.0], bad)
    with pytest.raises(UsageError, match="error rate"):
        st.decide([0.0, 1.0], 0.5, alpha=bad)


@pytest.mark.parametrize("margin", [0, -1, True])
def test_a_margin_is_positive(margin: float) -> None:
    with pytest.raises(UsageError, match="margin"):
        st.p_equivalent([0.0, 1.0], margin)


def test_one_chunk_decides_nothing() -> None:
    one = st.decide([0.0], 0.5)
    assert one.verdict == "undecided" and one.delta.low == -100 and one.delta.high == math.inf
    assert str(one) == "undecided (1 more chunk)"


def test_other_tokens_are_no_pair() -> None:
    base, pair = scores(None), scores("q4_0:q4_0")
    other = st.Scores(pair.nll, pair.top, pair.token + 1)
    with pytest.raises(UsageError, match="same tokens"):
        st.log_ratio(other, base)
