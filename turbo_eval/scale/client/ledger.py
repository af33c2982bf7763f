"""What a spread sweep has on record: stores by machine, comparisons begun elsewhere, results so far."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from turbo_eval.metrics import references
from turbo_eval.metrics.base import Job
from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record, Run
from turbo_eval.records.store import Store
from turbo_eval.scale.client.placement import Group
from turbo_eval.util.process import relevant_environment


class Ledger:
    """Records of the plan's jobs.

    Args:
        results: the folder that holds a folder a machine.
        own_machine: looked at first.
    """

    def __init__(self, results: Path, own_machine: str, jobs: tuple[Job, ...]) -> None:
        self.records: dict[int, Record] = {}
        self.reused = 0
        self.partly: dict[str, set[str]] = {}  # comparisons: machines that have a part on record
        self._results, self._own, self._jobs = results, own_machine, jobs
        self._stores: dict[str, Store] = {}
        self._provenances: dict[str, Provenance] = {}

    def store(self, machine: str) -> Store:
        """The records of a machine."""
        if machine not in self._stores:
            self._stores[machine] = Store(self._results, machine)
        return self._stores[machine]

    def whole(self, groups: Iterable[Group]) -> dict[int, Record]:
        """Comparisons that one machine has whole; the others remember who has a part."""
        found: dict[int, Record] = {}
        if not self._results.is_dir():
            return found
        folders = sorted(
            (p.name for p in self._results.iterdir() if p.is_dir()), key=lambda n: (n != self._own, n)
        )
        for group in groups:
            for machine in folders:
                good = {n: r for n in group.numbers if (r := self.good(self._jobs[n].cell, machine))}
                if len(good) == len(group.numbers):
                    found |= good
                    break
                if good:
                    self.partly.setdefault(group.name, set()).add(machine)
        return found

    def good(self, cell: Cell, machine: str) -> Record | None:
        """The record with a number, if the machine has it."""
        record = self.store(machine).load(cell)
        return record if record is not None and record.ok else None

    def references(self, cell: Cell, machine: str) -> tuple[Record, ...]:
        """What a cell is judged by, as far as it is on record."""
        found = (self.good(reference, machine) for reference in references(cell))
        return tuple(record for record in found if record is not None)

    def keep(self, number: int, record: Record, *, reused: bool) -> None:
        """Take a record in, holding the plan's cell and one provenance with its like: a third of the
        memory."""
        known = self._provenances.setdefault(record.machine, record.provenance)
        cell = self._jobs[number].cell
        shared = {"cell": cell} if record.cell == cell else {}
        self.records[number] = record.model_copy(
            update=shared | ({"provenance": known} if record.provenance == known else {})
        )
        self.reused += reused

    def write(self, record: Record, machine: str, log: str) -> None:
        """Log and record into the machine's folder."""
        store = self.store(machine)
        store.log_path(record.cell).write_text(log, encoding="utf-8")  # in place: the lock is on this file
        store.write(record)

    def lost(self, cell: Cell, machine: str, detail: str, provenance: Provenance) -> Record:
        """The record of a cell whose workers were lost, one after the other."""
        store = self.store(machine)
        run = Run(
            argv=(),
            env=relevant_environment(),
            env_removed=(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=0.0,
            cpu_seconds=0.0,
            peak_mib=0.0,
            returncode=None,
            threads=0,
            log=str(store.log_path(cell).relative_to(store.root)),
        )
        return Record(
            key=cell.key(), cell=cell, status="crash", detail=detail, run=run, provenance=provenance
        )
