"""results/: one JSON record a cell, by machine; written atomically, locked by cell."""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record, read_record
from turbo_eval.util.files import writing

HISTORY = "history"  # records that a newer one replaced, and failures that replaced nothing
_ASIDE = ("bench", HISTORY)  # folders whose files are no records to show


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

    def tokens_path(self, cell: Cell) -> Path:
        """Where the figures of each token of a cell go."""
        return self.dir / "tokens" / f"{cell.key()}.npz"

    def load(self, cell: Cell) -> Record | None:
        """The record of exactly this cell on this machine; None if there is none that can be read."""
        for path in self._places(cell):
            record = self._read(path)
            if record is not None:
                return record
        return None

    def unreadable(self, cell: Cell) -> Path | None:
        """The file that should hold the record of this cell and doesn't, if there is one."""
        places = self._places(cell)
        return places[0] if places and self.load(cell) is None else None

    def _places(self, cell: Cell) -> list[Path]:
        named = (self.path(cell), self._by_key().get(cell.key()))
        return [path for path in dict.fromkeys(named) if path is not None and path.is_file()]

    def _read(self, path: Path) -> Record | None:
        """The record in a file; None, and a warning, if it holds none of this machine's."""
        record = read_or_warn(path)
        if record is not None and record.machine != self.dir.name:
            warn_once(f"{path} is a record of another machine, {record.machine}; it is left out")
            return None
        return record

    def _by_key(self) -> dict[str, Path]:
        """Files by key as of the first look: a cell may be on record under another name of its model.
        Listing thousands of files for each cell would cost more than the rest of the harness."""
        if self._names is None:
            self._names = {path.name.split(".")[-2]: path for path in self.dir.glob("*.*.json")}
        return self._names

    def all(self) -> list[Record]:
        """Every readable record of this machine; unreadable ones are left out with a warning."""
        found = (self._read(path) for path in sorted(self.dir.glob("*.json")))
        return [record for record in found if record is not None]

    def write(self, record: Record) -> Path:
        """Write atomically: the file is whole or it isn't there. What is on record never gets worse: a number
        gives way only to a number, and then goes to history/; a failure beside it goes there at once.

        Raises:
            EnvironmentProblem: the disk is full or not writable.
        """
        before = [
            (path, old) for path in self._places(record.cell) if (old := _read_quietly(path)) and old.ok
        ]
        if before and not record.ok:
            return self._put(record, self._past(record))
        for _, old in before:
            if old != record:
                self._put(old, self._past(old))
        return self._put(record, self.path(record.cell))

    def _past(self, record: Record) -> Path:
        """A place in history/ for a record that is not the one to show."""
        when = re.sub(r"[^0-9T]", "", record.run.started.partition("+")[0])
        stem = self.path(record.cell).name.removesuffix(".json")
        names = (f"{stem}.{when}{f'-{n}' if n else ''}.json" for n in range(10**6))
        return next(path for name in names if not (path := self.dir / HISTORY / name).exists())

    def _put(self, record: Record, path: Path) -> Path:
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with scratch.open("w", encoding="utf-8") as file:
                    file.write(record.to_json())
                    file.flush()
                    os.fsync(file.fileno())
                current = path.parent == self.dir
                old = self._by_key().get(record.key)
                if current and old is not None and old != path:  # recorded under another name of the model
                    old.unlink(missing_ok=True)
                scratch.replace(path)
                if current:
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


_WARNED: set[str] = set()


def warn_once(text: str) -> None:
    """A line on stderr, the first time."""
    if text not in _WARNED:
        _WARNED.add(text)
        print(f"turbo-eval: warning: {text}", file=sys.stderr)


def read_or_warn(path: Path) -> Record | None:
    """The record in a file; None, and a warning that names it, if it cannot be read."""
    try:
        return read_record(path)
    except IncompleteError as error:
        warn_once(f"{error.message}; it is left out")
        return None


def _read_quietly(path: Path) -> Record | None:
    try:
        return read_record(path)
    except IncompleteError:
        return None


def record_files(paths: Iterable[Path]) -> list[Path]:
    """Record files under the given files and folders, sorted.

    Raises:
        UsageError: a path does not exist.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.json"))
            files += [p for p in found if not p.name.startswith(".") and p.parent.name not in _ASIDE]
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"results {path} do not exist", "run `turbo-eval sweep` first")
    return files


def read_all(paths: Iterable[Path]) -> list[Record]:
    """Read every record under the given files and folders; one that cannot be read is left out with a
    warning.

    Raises:
        UsageError: a path does not exist.
    """
    found = (read_or_warn(path) for path in record_files(paths))
    return [record for record in found if record is not None]


def record_folders(paths: Iterable[Path]) -> list[Path]:
    """Folders that hold record files, under the given files and folders.

    Raises:
        UsageError: a path does not exist.
    """
    return list(dict.fromkeys(path.parent for path in record_files(paths)))
