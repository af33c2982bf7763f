"""The answer of a report: for each model the best pair for three sizes of cache, its cost, how to run it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from turbo_eval.analysis.picture.points import Point, front
from turbo_eval.analysis.summary import Summary
from turbo_eval.formats.window import resolve
from turbo_eval.util.numbers import AUTO

# Share of f16's memory that a cache may take, and its name.
BUDGETS = ((0.55, "half of f16's memory"), (0.3, "under a third"), (0.25, "a quarter"))
AT = 8192  # tokens that memory is counted at: with few, an exact window is most of the cache


@dataclass(frozen=True)
class Choice:
    """A budget's best pair. `cost` holds its loss with a 95 % interval, `row` its number in the table."""

    budget: str
    name: str
    size: str
    cost: tuple[str, ...]
    command: str
    row: int


@dataclass(frozen=True)
class Card:
    """The answer for a model. `setting` is the number of the setting it is taken from, from 0."""

    model: str
    setting: int
    choices: tuple[Choice, ...]
    note: str


def cards(groups: Sequence[Sequence[Summary]]) -> list[Card]:
    """One card a model, from its setting with the most text; the build's own choice of anchor comes first."""
    best: dict[str, int] = {}
    for number, rows in enumerate(groups):
        model = rows[0].model
        if model not in best or _weight(rows) > _weight(groups[best[model]]):
            best[model] = number
    return [_card(groups[number], number) for number in best.values()]


def _weight(rows: Sequence[Summary]) -> tuple[bool, bool, int]:
    first = rows[0]
    return front(rows, AT) is not None, first.anchor in ("auto", ""), first.ctx * first.chunks


def _card(rows: Sequence[Summary], number: int) -> Card:
    found = front(rows, AT)
    choices: list[Choice] = []
    for share, words in BUDGETS if found is not None else ():
        fits = [p for p in found.points if p.bits <= 16 * share] if found is not None else []
        if fits:
            choices.append(_choice(words, _best(fits), rows))
    model = rows[0].model.split("/")[-1]
    note = "" if choices else "No quantized pair was measured beside f16/f16: there is nothing to recommend."
    return Card(model, number, tuple(choices), note)


def _best(fits: Sequence[Point]) -> Point:
    """The least loss; of those that the text can't tell from it, the one with the most bits."""
    best = min(fits, key=lambda p: p.loss)
    alike = [p for p in fits if p.loss - best.loss <= 2 * math.hypot(p.error or 0, best.error or 0)]
    return max(alike, key=lambda p: (p.bits, -p.loss))


def _choice(budget: str, point: Point, rows: Sequence[Summary]) -> Choice:
    row = rows[point.row]
    size = f"{point.bits:.2f} bits per value at {AT} tokens, {16 / point.bits:.1f} times smaller"
    return Choice(budget, point.name, size, _cost(row), command(row), point.row)


def _cost(row: Summary) -> tuple[str, ...]:
    said = []
    if row.delta is not None:
        said.append(f"ΔPPL {_interval(row.delta.pct, row.delta.err_pct, row.delta.df, '+.2f')} %")
    record = row.get("kld")
    if record is not None and record.kld is not None:
        many = 10**6
        said.append(f"KLD {_interval(record.kld.mean, record.kld.mean_err, many, '.4f')} nats")
    return tuple(said)


def _interval(value: float, error: float | None, freedom: int, form: str) -> str:
    """ "+0.53 (−0.61 … +1.67)": the figure and its 95 % interval."""
    if not error:
        return f"{value:{form}}".replace("-", "−")
    half = float(student.ppf(0.975, max(1, freedom))) * error
    return f"{value:{form}} ({value - half:{form}} … {value + half:{form}})".replace("-", "−")


def command(row: Summary) -> str:
    """The llama-server line of a pair or profile, for files of these names in the folder at hand."""
    name = row.model.split("/")[-1].removesuffix(".gguf")
    argv = ["llama-server", "-m", f"{name}.gguf", "-fa", "on"]
    if row.profile_file is not None:
        argv += ["--kv-profile", row.profile_file.name]
    else:
        argv += ["-ctk", row.k, "-ctv", row.v]
    if row.profile is not None or row.window != resolve(AUTO, AUTO, row.k, row.v):
        argv += ["--kv-recent", str(row.window.recent), "--kv-first", str(row.window.first)]
    if row.anchor in ("on", "off") and row.k not in ("f16", "f32", "bf16"):
        argv += ["--kv-anchor", row.anchor]
    return shlex.join(argv)
