"""results/: one JSON record a cell, by machine; written atomically, locked by cell."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.records.record import Cell, Record, read_record
from turbo_eval.util.files import writing


class Store:
    """The records of one machine under a results folder."""

    def __init__(self, root: Path, machine: str) -> None:
        self.root = root
        self.dir = root / machine
        self._names: dict[str, Path] | None = None

    def path(self, cell: Cell) -> Path:
        """Where a cell's record goes; people read the name, the key at its end decides."""
        model = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(cell.model).stem if "/" in cell.model else cell.model)
        return self.dir / f"{model}.{cell.metric}.{cell.k}-{cell.v}.{cell.key()}.json"

    def log_path(self, cell: Cell) -> Path:
        """Where a cell's raw log goes."""
        return self.dir / "logs" / f"{cell.key()}.log"

    def load(self, cell: Cell) -> Record | None:
        """The record of exactly this cell; None if there is none that can be read."""
        for path in dict.fromkeys((self.path(cell), self._by_key().get(cell.key()))):
            try:
                if path is not None and path.is_file():
                    return read_record(path)
            except IncompleteError:
                continue
        return None

    def _by_key(self) -> dict[str, Path]:
        """Files by key as of the first look: a cell may be on record under another name of its model.
        Listing thousands of files for each cell would cost more than the rest of the harness."""
        if self._names is None:
            self._names = {path.name.split(".")[-2]: path for path in self.dir.glob("*.*.json")}
        return self._names

    def all(self) -> list[Record]:
        """Every readable record of this machine; unreadable ones are left out."""
        records = []
        for path in sorted(self.dir.glob("*.json")):
            try:
                records.append(read_record(path))
            except IncompleteError:
                continue
        return records

    def write(self, record: Record) -> Path:
        """Write atomically: the file is whole or it isn't there.

        Raises:
            EnvironmentProblem: the disk is full or not writable.
        """
        path = self.path(record.cell)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with scratch.open("w", encoding="utf-8") as file:
                    file.write(record.to_json())
                    file.flush()
                    os.fsync(file.fileno())
                old = self._by_key().get(record.key)
                if old is not None and old != path:  # recorded under another name of the model
                    old.unlink(missing_ok=True)
                scratch.replace(path)
                self._by_key()[record.key] = path
            finally:
                scratch.unlink(missing_ok=True)
        return path

    @contextmanager
    def lock(self, cell: Cell, *, wait: bool) -> Iterator[bool]:
        """Hold the cell against other sweeps on this folder; yields False if it is taken.

        The lock is on the cell's log file and dies with the process: kill -9 leaves nothing behind.
        """
        place = self.log_path(cell)
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = place.open("a")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def record_files(paths: Iterable[Path]) -> list[Path]:
    """Record files under the given files and folders, sorted.

    Raises:
        UsageError: a path does not exist.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.json"))
            files += [p for p in found if not p.name.startswith(".") and p.parent.name != "bench"]
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"results {path} do not exist", "run `turbo-eval sweep` first")
    return files


def read_all(paths: Iterable[Path]) -> list[Record]:
    """Read every record under the given files and folders.

    Raises:
        UsageError: a path does not exist.
        IncompleteError: one of them cannot be read.
    """
    return [read_record(path) for path in record_files(paths)]
