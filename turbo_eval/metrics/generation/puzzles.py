"""Retrieval puzzles, made here: what is planted in a text, what is asked at its end, what must be answered.

The kinds follow RULER (Hsieh et al., 2024): several keys of which one is asked for, one key with several
values, a chain of variables, and the words that come up most often. All is drawn from a seed, so that every
cache gets the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["keys", "values", "variables", "words"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_NAMES = """
    harbor garden station museum library market bridge tower forest island castle mountain river
    village temple factory airport stadium theatre hospital
""".split()  # noqa: SIM905 words are easier to read than a list of them
_WORDS = """
    apple basket candle dragon engine feather guitar hammer iron jacket kettle lemon mirror needle
    orange pepper quilt rabbit saddle table umbrella violin window yellow zebra anchor bottle
    camera desert eagle
""".split()  # noqa: SIM905 words are easier to read than a list of them


@dataclass(frozen=True)
class Puzzle:
    """One prompt.

    Attributes:
        planted: sentences to spread over the text, in this order.
        filler: text between them; "": that of the corpus.
        question: the end of the prompt.
        answers: all of them must be in what follows.
        tokens: how many to generate.
    """

    planted: tuple[str, ...]
    filler: str
    question: str
    answers: tuple[str, ...]
    tokens: int


def puzzle(kind: Kind, seed: str, several: int, words: int) -> Puzzle:
    """Make one.

    Args:
        seed: the same seed gives the same puzzle.
        several: keys, values or links of the chain.
        words: rough length of the list of words.
    """
    draw = random.Random(f"{kind} {seed}")
    if kind == "keys":
        names = draw.sample(_NAMES, several)
        numbers = [str(draw.randrange(10000, 100000)) for _ in names]
        planted = [f" The secret number of the {a} is {b}. " for a, b in zip(names, numbers, strict=True)]
        asked = draw.randrange(several)
        question = f"\n\nThe secret number of the {names[asked]} is"
        return Puzzle(tuple(planted), "", question, (numbers[asked],), 12)
    if kind == "values":
        name = draw.choice(_NAMES)
        numbers = [str(draw.randrange(10000, 100000)) for _ in range(several)]
        planted = [f" One of the secret numbers of the {name} is {number}. " for number in numbers]
        question = f"\n\nThe {several} secret numbers of the {name} are"
        return Puzzle(tuple(planted), "", question, tuple(numbers), 10 * several)
    if kind == "variables":
        names = ["".join(draw.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 3)) for _ in range(several)]
        number = str(draw.randrange(10000, 100000))
        values = [number, *[f"VAR {name}" for name in names]]
        planted = [f" VAR {name} = {value}. " for name, value in zip(names, values, strict=False)]
        question = f"\n\nThe value of VAR {names[-1]} is the number"
        return Puzzle(tuple(planted), "", question, (number,), 12)
    common, rare = _split(draw)
    bag = [word for word in common for _ in range(max(2, words // 8))]
    bag += [draw.choice(rare) for _ in range(max(0, words - len(bag)))]
    draw.shuffle(bag)
    question = f"\n\nThe two words that come up most often in this list are {common[0]} and"
    return Puzzle((), "A list of words: " + " ".join(bag), question, (common[1],), 6)


def _split(draw: random.Random) -> tuple[list[str], list[str]]:
    words = draw.sample(_WORDS, len(_WORDS))
    return words[:2], words[2:]


def answered(puzzle: Puzzle, text: str) -> bool:
    """Are all answers in what was generated?"""
    plain = text.replace(",", " ").replace(".", " ").lower()
    return all(answer in plain for answer in puzzle.answers)
