"""Puzzles are the same for every cache, hold their answers, and outcomes are compared pair by pair."""

from __future__ import annotations

import pytest

from turbo_eval.metrics.generation.puzzles import KINDS, Kind, answered, puzzle
from turbo_eval.metrics.retrieval import compare_retrieval


@pytest.mark.parametrize("kind", KINDS)
def test_a_puzzle_holds_its_answers_and_depends_on_its_seed_alone(kind: Kind) -> None:
    one = puzzle(kind, "512 0", 4, 200)
    assert one == puzzle(kind, "512 0", 4, 200) != puzzle(kind, "512 1", 4, 200)
    text = "".join(one.planted) + one.filler
    assert all(answer in text and answer not in one.question for answer in one.answers)
    assert answered(one, " " + ", ".join(one.answers) + ".")
    assert not answered(one, " ".join(one.answers[1:]) + " 1")


def test_the_kinds_are_what_they_say() -> None:
    keys, values, chain, words = (puzzle(kind, "a", 4, 200) for kind in KINDS)
    assert len(keys.planted) == len(values.planted) == len(chain.planted) == 4
    assert len(values.answers) == 4
    assert chain.planted[0].count(chain.answers[0]) == 1 and not any(
        chain.answers[0] in text for text in chain.planted[1:]
    )
    counts = {word: words.filler.split().count(word) for word in set(words.filler.split())}
    assert counts[words.answers[0]] >= 1.5 * sorted(counts.values())[-3]


def test_outcomes_are_compared_pair_by_pair() -> None:
    told = compare_retrieval("1100" + "0" * 8, "1010" + "1" * 8)
    assert (told["retrieval_f16"], told["retrieval_kept"]) == (10, 1)
    assert (told["retrieval_lost"], told["retrieval_won"]) == (9, 1)
    assert told["retrieval_p"] == pytest.approx(22 / 1024)
    assert compare_retrieval("10", "10")["retrieval_p"] == 1.0
