"""Two sides of records, and which of their cells ask the same question."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.paths import results_dir
from turbo_eval.record import Record
from turbo_eval.store import read_all

Field = Callable[[Record], str]


def _anchor(record: Record) -> str:
    return record.cell.anchor_sha256 or record.cell.anchor


# What a cell must share to be the same question, whatever is compared.
_QUESTION: dict[str, Field] = {
    "metric": lambda r: r.cell.metric,
    "model": lambda r: r.cell.model_sha256,
    "corpus": lambda r: r.cell.corpus_sha256,
    "ctx": lambda r: str(r.cell.ctx),
    "chunks": lambda r: str(r.cell.chunks),
    "options": lambda r: json.dumps(r.cell.options, sort_keys=True),
}
# What the two sides may be compared *in*: left out of the match when they have no value in common.
_CONTRAST: dict[str, Field] = {
    "k": lambda r: r.cell.k,
    "v": lambda r: r.cell.v,
    "tree": lambda r: r.cell.tree,
    "backend": lambda r: r.cell.backend,
    "anchor": _anchor,
    "batch": lambda r: str(r.cell.batch),
    "ubatch": lambda r: str(r.cell.ubatch),
    "flash_attn": lambda r: str(r.cell.flash_attn),
    "env": lambda r: json.dumps(r.cell.env, sort_keys=True),
    "machine": lambda r: r.machine,
}
_SELECTABLE: dict[str, Field] = {
    "metric": _QUESTION["metric"],
    "model": lambda r: r.cell.model,
    "ctx": _QUESTION["ctx"],
    "chunks": _QUESTION["chunks"],
    **{name: _CONTRAST[name] for name in ("k", "v", "tree", "backend", "ubatch", "machine")},
    "anchor": lambda r: r.cell.anchor,
    "pin": lambda r: r.provenance.pin,
}
_BY_PREFIX = frozenset({"tree", "pin", "machine"})


@dataclass(frozen=True)
class Side:
    """`name` as the user gave it; what it selects."""

    name: str
    records: tuple[Record, ...]


def read_side(text: str) -> Side:
    """`FOLDER`, `FOLDER@field=value,field=value` or `@field=value` (our results folder).

    Raises:
        UsageError: no such folder, no such field, or nothing fits.
        IncompleteError: a record that cannot be read.
    """
    place, at, wishes = text.rpartition("@") if "@" in text and not Path(text).exists() else (text, "", "")
    records = read_all([Path(place) if place else results_dir()])
    for wish in filter(None, wishes.split(",")) if at else ():
        name, equals, value = wish.partition("=")
        if not equals or name not in _SELECTABLE:
            raise UsageError(
                f"{wish!r} in {text} selects nothing",
                f"write field=value with a field of {', '.join(_SELECTABLE)}",
            )
        read = _SELECTABLE[name]
        records = [
            r
            for r in records
            if read(r) == value or (name in _BY_PREFIX and value and read(r).startswith(value))
        ]
    if not records:
        raise UsageError(f"{text} holds no records", "look with `turbo-eval table`, or sweep first")
    return Side(text, tuple(records))


@dataclass(frozen=True)
class Matched:
    """Records of the same cell on both sides; what only one side has, in words; remarks."""

    pairs: tuple[tuple[Record, Record], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]


def match(a: Side, b: Side) -> Matched:
    """Pair the cells of two sides. What they have no value of in common is what they are compared in.

    Raises:
        IncompleteError: they have no cell in common; says which field parts them.
    """
    contrasts = [name for name, read in _CONTRAST.items() if not _values(read, a) & _values(read, b)]
    readers = [*_QUESTION.values(), *(read for name, read in _CONTRAST.items() if name not in contrasts)]
    notes: list[str] = []
    left, right = (_by_identity(side, readers, notes) for side in (a, b))
    common = [identity for identity in left if identity in right]
    if not common:
        apart = [n for n, read in _QUESTION.items() if not _values(read, a) & _values(read, b)]
        reason = f"they have no {apart[0]} in common" if apart else "no cell is on both sides"
        raise IncompleteError(
            f"{a.name} and {b.name} cannot be compared: {reason}",
            "sweep the same model, corpus, context, chunks and pairs on both sides",
        )
    if all(left[identity] == right[identity] for identity in common):
        notes.append("both sides are the same records")
    return Matched(
        pairs=tuple((left[identity], right[identity]) for identity in common),
        only_a=_missing(left, right),
        only_b=_missing(right, left),
        notes=tuple(dict.fromkeys(notes)),
    )


def _values(read: Field, side: Side) -> set[str]:
    return {read(r) for r in side.records}


Identity = tuple[str, ...]


def _by_identity(side: Side, readers: Sequence[Field], notes: list[str]) -> dict[Identity, Record]:
    """The newest record of each identity."""
    found: dict[Identity, Record] = {}
    for record in sorted(side.records, key=lambda r: r.run.started):
        identity = tuple(read(record) for read in readers)
        older = found.get(identity)
        if older is not None:
            notes.append(f"{side.name} has several records of some cells; the newest of each is taken")
        found[identity] = record
    return found


def _missing(here: dict[Identity, Record], there: dict[Identity, Record]) -> tuple[str, ...]:
    lacking = [r for identity, r in here.items() if identity not in there]
    return tuple(
        dict.fromkeys(f"{r.cell.model} {r.cell.pair()} {r.cell.metric} -c {r.cell.ctx}" for r in lacking)
    )
