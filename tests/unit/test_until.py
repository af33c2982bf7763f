"""Looking until it is decided: the error rate holds at all looks together, on real figures of each token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.unit.test_paired import Floats, planted
from turbo_eval.evidence import paired as st
from turbo_eval.records.pairing import Paired
from turbo_eval.sweep.until import FIRST, next_look

RUNS = 200
MARGIN = 0.5
MOST = 128
# What 200 runs may show of a rate that is truly 5 %: three standard errors more.
AT_MOST = 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)


def until_decided(text: Floats, margin: float = MARGIN) -> tuple[str, int, int]:
    """(verdict, chunks, looks) of one sweep over a text whose chunks have these differences."""
    chunks, looks = FIRST, 0
    while True:
        looks += 1
        decision = Paired(tuple(text[:chunks]), sequential=True).decide(margin)
        if decision.verdict != "undecided" or chunks >= len(text):
            return decision.verdict, chunks, looks
        chunks = next_look(chunks, [decision.more_chunks], len(text))


def texts(values: Floats, seed: int = 3) -> Floats:
    """RUNS texts of MOST chunks, drawn from the real ones: (runs, chunks)."""
    drawn: Floats = np.random.default_rng(seed).choice(st.chunk_means(values), size=(RUNS, MOST))
    return drawn


def verdicts(values: Floats) -> tuple[dict[str, float], float]:
    """(share of each verdict, median of the chunks that were needed)."""
    found = [until_decided(text) for text in texts(values)]
    share = {
        v: sum(x == v for x, _, _ in found) / RUNS for v in ("equivalent", "worse", "better", "undecided")
    }
    return share, float(np.median([chunks for _, chunks, _ in found]))


def test_planted_caches_are_called_what_they_are() -> None:
    worse, chunks_worse = verdicts(planted("q8_0:q8_0", 1.0))
    assert worse["worse"] >= 0.95 and worse["equivalent"] + worse["better"] <= AT_MOST
    alike, chunks_alike = verdicts(planted("q8_0:q8_0", 0.1))
    assert alike["equivalent"] >= 0.95 and alike["worse"] + alike["better"] <= AT_MOST
    assert max(chunks_worse, chunks_alike) <= MOST / 2, "stopping early saves more than half of 128 chunks"


def test_an_identical_cache_is_never_worse_and_needs_no_more_than_the_first_look() -> None:
    assert until_decided(np.zeros(MOST)) == ("equivalent", FIRST, 1)
    share, _ = verdicts(planted("q8_0:q8_0", 0.0))
    assert share["worse"] == share["better"] == 0.0


@pytest.mark.parametrize("pair", ["q8_0:q8_0", "q4_0:q4_0", "turbo3:turbo3"])
@pytest.mark.parametrize("percent", [MARGIN, -MARGIN])
def test_at_the_margin_any_verdict_is_wrong_and_stays_rare(pair: str, percent: float) -> None:
    share, _ = verdicts(planted(pair, percent))
    wrong = "worse" if percent > 0 else "better"
    assert share["equivalent"] <= AT_MOST
    assert share[wrong] <= AT_MOST


def test_testing_at_each_look_as_if_it_were_the_only_one_errs_more_often() -> None:
    """What the confidence sequence is for."""

    def plain(text: Floats) -> bool:
        return any(st.decide(text[:n], MARGIN).verdict == "equivalent" for n in range(FIRST, MOST + 1, 4))

    false = sum(plain(text) for text in texts(planted("q8_0:q8_0", MARGIN))) / RUNS
    assert false > 0.12


def test_the_next_look() -> None:
    assert next_look(8, [3, None], 128) == 12, "half as many again at least"
    assert next_look(8, [6, 100], 128) == 14, "what the nearest pair needs"
    assert next_look(8, [500], 128) == 16, "twice as many at most: the guess is rough"
    assert next_look(8, [None], 128) == 16
    assert next_look(100, [90], 128) == 128
    assert next_look(2, [1], 128) == 4
