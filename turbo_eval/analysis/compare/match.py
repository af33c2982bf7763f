"""Two sides of records, and which of their cells ask the same question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.records.record import Record
from turbo_eval.records.speed import BenchRecord, read_bench
from turbo_eval.records.store import read_all
from turbo_eval.util.paths import results_dir

Entry = Record | BenchRecord

# What a cell must share to be the same question, whatever is compared.
_QUESTION = ("metric", "model", "corpus", "ctx", "chunks", "options")
# What the two sides may be compared *in*: left out of the match when they have no value in common.
_CACHE = ("k", "v", "profile", "recent", "first", "tree", "backend")
_CONTRAST = (*_CACHE, "anchor", "batch", "ubatch", "flash_attn", "env", "machine")
_SELECTABLE = ("metric", "model", "ctx", "chunks", *_CACHE, "ubatch", "machine", "anchor", "pin")
_BY_PREFIX = frozenset({"tree", "pin", "machine", "profile"})


def facts(entry: Entry) -> dict[str, str]:
    """What identifies a record of quality or of speed, under common names.

    Speed: `ctx` is the depth, `chunks` prompt + generated tokens, the metric "speed", or that of several
    sequences or of drafts, with their number in `options`.
    """
    if isinstance(entry, BenchRecord):
        return {
            "metric": "speed" if entry.workload == "depth" else f"{entry.workload} speed",
            "model": entry.model_sha256,
            "model name": entry.model,
            **({"options": str(entry.size)} if entry.workload != "depth" else {}),
            "ctx": str(entry.depth),
            "chunks": f"{entry.prompt}+{entry.gen}",
            "k": entry.k,
            "v": entry.v,
            "profile": entry.profile.sha256 if entry.profile is not None else "",
            "recent": str(entry.recent),
            "first": str(entry.first),
            "tree": entry.tree,
            "backend": entry.backend,
            "anchor": entry.anchor,
            "env": json.dumps(entry.env, sort_keys=True),
            "machine": entry.provenance.machine.id,
            "threads": str(entry.threads),
            "started": entry.started,
        }
    cell = entry.cell
    return {
        "metric": cell.metric,
        "model": cell.model_sha256,
        "model name": cell.model,
        "corpus": cell.corpus_sha256,
        "corpus name": cell.corpus.split("/")[-1],
        "ctx": str(cell.ctx),
        "chunks": str(cell.chunks),
        "options": json.dumps(cell.options, sort_keys=True),
        "k": cell.k,
        "v": cell.v,
        "profile": cell.profile.sha256 if cell.profile is not None else "",
        "recent": str(cell.recent),
        "first": str(cell.first),
        "tree": cell.tree,
        "backend": cell.backend,
        "anchor": cell.anchor_sha256 or cell.anchor,
        "batch": str(cell.batch),
        "ubatch": str(cell.ubatch),
        "flash_attn": str(cell.flash_attn),
        "env": json.dumps(cell.env, sort_keys=True),
        "machine": entry.machine,
        "threads": str(entry.run.threads),
        "started": entry.run.started,
    }


def _selects(entry: Entry, name: str, value: str) -> bool:
    own = facts(entry)
    have = {own.get(name, "")}
    if name == "model":
        have = {own["model name"]}
    elif name == "pin":
        have = {entry.provenance.pin}
    elif name == "anchor" and isinstance(entry, Record):
        have = {entry.cell.anchor}
    return value in have or (name in _BY_PREFIX and bool(value) and any(h.startswith(value) for h in have))


@dataclass(frozen=True)
class Side:
    """`name` as the user gave it; the records it selects, and those of speed."""

    name: str
    records: tuple[Record, ...]
    speeds: tuple[BenchRecord, ...] = ()


def read_side(text: str) -> Side:
    """`FOLDER`, `FOLDER@field=value,field=value` or `@field=value` (our results folder).

    Raises:
        UsageError: no such folder, no such field, or nothing fits.
        IncompleteError: a record that cannot be read.
    """
    place, at, wishes = text.rpartition("@") if "@" in text and not Path(text).exists() else (text, "", "")
    root = Path(place) if place else results_dir()
    found: list[Entry] = [*read_all([root])]
    if root.is_dir():
        found += read_bench(root) or [
            r for r in read_bench(root.parent) if r.provenance.machine.id == root.name
        ]
    for wish in filter(None, wishes.split(",")) if at else ():
        name, equals, value = wish.partition("=")
        if not equals or name not in _SELECTABLE:
            raise UsageError(
                f"{wish!r} in {text} selects nothing",
                f"write field=value with a field of {', '.join(_SELECTABLE)}",
            )
        found = [entry for entry in found if _selects(entry, name, value)]
    if not found:
        raise UsageError(f"{text} holds no records", "look with `turbo-eval table`, or sweep first")
    return Side(
        text,
        tuple(entry for entry in found if isinstance(entry, Record)),
        tuple(entry for entry in found if isinstance(entry, BenchRecord)),
    )


@dataclass(frozen=True)
class Matched:
    """Records of the same cell on both sides; what only one side has, in words; remarks."""

    pairs: tuple[tuple[Record, Record], ...]
    speeds: tuple[tuple[BenchRecord, BenchRecord], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]


def match(a: Side, b: Side) -> Matched:
    """Pair the cells of two sides. What they have no value of in common is what they are compared in.

    Raises:
        IncompleteError: they have no cell in common; says which field parts them.
    """
    notes: list[str] = []
    quality = _pairs(a.records, b.records, a, b, notes)
    speeds = _pairs(a.speeds, b.speeds, a, b, notes)
    if not quality.common and not speeds.common:
        apart = _apart(a.records or a.speeds, b.records or b.speeds)
        reason = f"they have no {apart} in common" if apart else "no cell is on both sides"
        raise IncompleteError(
            f"{a.name} and {b.name} cannot be compared: {reason}",
            "sweep the same model, corpus, context, chunks and pairs on both sides",
        )
    if all(x == y for x, y in (*quality.common, *speeds.common)):
        notes.append("both sides are the same records")
    return Matched(
        pairs=quality.common,
        speeds=speeds.common,
        only_a=(*quality.only_a, *speeds.only_a),
        only_b=(*quality.only_b, *speeds.only_b),
        notes=tuple(dict.fromkeys(notes)),
    )


_E = TypeVar("_E", Record, BenchRecord)


@dataclass(frozen=True)
class _Pairs(Generic[_E]):
    common: tuple[tuple[_E, _E], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def _pairs(a: Sequence[_E], b: Sequence[_E], left: Side, right: Side, notes: list[str]) -> _Pairs[_E]:
    shared: tuple[str, ...] = tuple(name for name in _CONTRAST if _values(name, a) & _values(name, b))
    fields = (*_QUESTION, *shared)
    x, y = _by_identity(a, fields, left.name, notes), _by_identity(b, fields, right.name, notes)
    common = tuple((x[identity], y[identity]) for identity in x if identity in y)
    return _Pairs(common, _missing(x, y), _missing(y, x))


def _values(name: str, entries: Sequence[Entry]) -> set[str]:
    return {facts(entry).get(name, "") for entry in entries}


def _apart(a: Sequence[Entry], b: Sequence[Entry]) -> str:
    return next((name for name in _QUESTION if not _values(name, a) & _values(name, b)), "")


Identity = tuple[str, ...]


def _by_identity(
    entries: Sequence[_E], fields: Sequence[str], side: str, notes: list[str]
) -> dict[Identity, _E]:
    """The newest record of each identity."""
    found: dict[Identity, _E] = {}
    for entry in sorted(entries, key=lambda e: facts(e)["started"]):
        own = facts(entry)
        identity = tuple(own.get(name, "") for name in fields)
        if identity in found:
            notes.append(f"{side} has several records of some cells; the newest of each is taken")
        found[identity] = entry
    return found


def _missing(here: dict[Identity, _E], there: dict[Identity, _E]) -> tuple[str, ...]:
    lacking = [facts(entry) for identity, entry in here.items() if identity not in there]
    return tuple(dict.fromkeys(_in_words(f) for f in lacking))


def _in_words(f: dict[str, str]) -> str:
    text = f", {f['chunks']} chunks of {f['corpus name']}" if "corpus name" in f else ""
    return f"{f['model name']} {f['k']}:{f['v']} {f['metric']} -c {f['ctx']}{text}"
