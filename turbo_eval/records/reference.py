"""What a number is compared with: the reference of a comparison, found in one way by every command.

The reference is f16/f16 of the same model, text, context, chunks, build and machine, with the K anchor off.
Another pair takes its place only where somebody names one. Nothing else ever stands in for it: without a
reference there is no difference to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store

Pair = tuple[str, str]
EXACT: Pair = ("f16", "f16")
_F16: dict[str, Any] = {"k": "f16", "v": "f16", "recent": 0, "first": 0, "profile": None}
# "auto" leaves a K of 16 bits alone; what ran is read back, see `serves`.
_ANCHORS_OFF = ("off", "auto")
# A perplexity comes from a plain run, or from a KL run, which prints it too.
_BATCHED = ("ppl", "kld")


def exact_cell(cell: Cell) -> Cell:
    """The plain run of the reference of `cell`, which also writes the base of its KL divergence."""
    return cell.batched("ppl").model_copy(
        update={"metric": "ppl", "anchor": "off", "anchor_sha256": "", "options": {}} | _F16
    )


def exact_generation_cell(cell: Cell) -> Cell:
    """What a "greedy" or "needle" cell is compared with: the same of f16/f16, anchor off."""
    update = _F16
    if cell.anchor not in _ANCHORS_OFF:
        update = update | {"anchor": "off", "anchor_sha256": ""}
    return cell.model_copy(update=update)


def is_exact(cell: Cell) -> bool:
    """Is it asked for as a reference would be?"""
    return (
        (cell.k, cell.v) == EXACT and cell.anchor in _ANCHORS_OFF and not cell.window and cell.profile is None
    )


def serves(record: Record) -> bool:
    """Can the record be the reference that nobody has to name? What ran decides, not what was asked for."""
    ran_with_anchor = (record.effective.anchor or "off").startswith("on")
    return is_exact(record.cell) and not ran_with_anchor and _has_number(record)


def _has_number(record: Record) -> bool:
    return record.ok and record.ppl is not None and record.cell.metric in _BATCHED


def candidates(cell: Cell, against: Pair | None = None) -> tuple[Cell, ...]:
    """The cells whose record may be the reference of `cell`, the preferred one first: that of the same kind
    of run, which prints as many digits.

    Args:
        against: the pair that was named; it is taken with the anchor of `cell`, and with its exact window or
            without one. None: f16/f16.
    """
    text = cell.batched("ppl").model_copy(update={"options": {}})
    if against in (None, EXACT):
        base = exact_cell(text)
        places = [base.model_copy(update={"anchor": anchor}) for anchor in _ANCHORS_OFF]
    else:
        assert against is not None
        own = text.model_copy(update={"k": against[0], "v": against[1], "profile": None})
        places = [own, *([own.model_copy(update={"recent": 0, "first": 0})] if own.window else [])]
    metrics = sorted(_BATCHED, key=lambda metric: metric != cell.metric)
    return tuple(place.model_copy(update={"metric": metric}) for metric in metrics for place in places)


def comparison(cell: Cell) -> str:
    """What the cells of one comparison have in common: they share a reference, so they are measured on one
    class of machine. A decode cell belongs to the batched run over the same corpus."""
    return cell.batched("ppl").reference_key()


Lookup = Callable[[str, Cell], Record | None]  # machine, cell


@dataclass(frozen=True)
class References:
    """Finds the reference of a record.

    Attributes:
        lookup: the record of a cell on a machine, None if there is none.
        against: the pair that was named; None: f16/f16.
        wanted: False: no comparison was asked for, so there is no reference.
    """

    lookup: Lookup
    against: Pair | None = None
    wanted: bool = True

    @classmethod
    def among(
        cls, records: Iterable[Record], against: Pair | None = None, *, wanted: bool = True
    ) -> References:
        """Looks among `records`."""
        known = {(r.machine, r.key): r for r in records}
        return cls(lambda machine, cell: known.get((machine, cell.key())), against, wanted)

    @classmethod
    def in_store(cls, store: Store, against: Pair | None = None, *, wanted: bool = True) -> References:
        """Looks in a results folder, whether the records were asked for or not."""
        stores = {store.dir.name: store}

        def lookup(machine: str, cell: Cell) -> Record | None:
            if machine not in stores:
                stores[machine] = Store(store.root, machine)
            return stores[machine].load(cell)

        return cls(lookup, against, wanted)

    @property
    def pair(self) -> Pair:
        """The pair that is compared with."""
        return self.against or EXACT

    @property
    def name(self) -> str:
        """How every output calls it."""
        return "/".join(self.pair)

    def of(self, record: Record) -> Record | None:
        """The reference of `record`; None: there is none with a number."""
        if not self.wanted:
            return None
        for cell in candidates(record.cell, self.against):
            found = self.lookup(record.machine, cell)
            if found is not None and (serves(found) if self.pair == EXACT else _has_number(found)):
                return found
        return None
