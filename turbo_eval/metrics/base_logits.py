"""The f16/f16 log-probabilities that KL divergence is taken against: computed once, bounded, verified.

Format (tools/perplexity/perplexity.cpp): "_logits_", int32 n_ctx, int32 n_vocab, int32 n_chunk,
n_ctx·n_chunk int32 tokens, then for each scored token n_vocab + 4 (rounded up to even) uint16.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama.tool import perplexity_argv
from turbo_eval.metrics.base import Bench, Job
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.records.reference import exact_cell
from turbo_eval.util import numbers
from turbo_eval.util.files import writing
from turbo_eval.util.paths import cache_dir

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8siii")
DEFAULT_CAP = 8 * 2**30


class BaseFailedError(Exception):
    """The f16/f16 run came to nothing; `record` says how."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.detail)
        self.record = record


# cell, its command line, the command line to put on record
RunExact = Callable[[Cell, list[str], list[str]], Record]


def file_bytes(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Exact size of the file llama-perplexity writes."""
    row = 2 * ((n_vocab + 1) // 2) + 4  # uint16 a token
    scored = n_ctx - 1 - n_ctx // 2
    return _HEADER.size + 4 * n_ctx * n_chunk + 2 * row * scored * n_chunk


@dataclass(frozen=True)
class BaseLogits:
    """A folder of base-logits files, the oldest dropped when their sum would pass `cap` bytes."""

    dir: Path
    cap: int

    @classmethod
    def default(cls) -> BaseLogits:
        """In the cache folder; TURBO_EVAL_LOGITS_GIB sets the cap.

        Raises:
            UsageError: TURBO_EVAL_LOGITS_GIB is no positive number.
        """
        text = os.environ.get("TURBO_EVAL_LOGITS_GIB")
        cap = DEFAULT_CAP
        if text:
            cap = int(numbers.read("TURBO_EVAL_LOGITS_GIB", text, numbers.GIB) * 2**30)
        return cls(cache_dir() / "logits", cap)

    def path(self, cell: Cell, machine: str) -> Path:
        """Where the base of `cell` lies. The machine is in the name: numbers differ between CPUs."""
        return self.dir / f"{exact_cell(cell).key()}.{machine}.dat"

    def size_for(self, cell: Cell, n_vocab: int) -> int:
        """Bytes the base of `cell` takes."""
        return file_bytes(cell.ctx, n_vocab, cell.chunks)

    def used(self) -> int:
        """Bytes in the folder."""
        return sum(p.stat().st_size for p in self.dir.glob("*.dat"))

    def fault(self, path: Path, cell: Cell) -> str | None:
        """Why the file cannot serve as the base of `cell`; None if it can."""
        try:
            note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            size = path.stat().st_size
            with path.open("rb") as file:
                magic, n_ctx, n_vocab, n_chunk = _HEADER.unpack(file.read(_HEADER.size))
        except FileNotFoundError:
            return "it is not there"
        except (OSError, ValueError, struct.error) as error:
            return f"it cannot be read: {error}"
        if magic != _MAGIC or (n_ctx, n_chunk) != (cell.ctx, cell.chunks):
            return f"its header says {n_chunk} chunks of {n_ctx} tokens"
        if note.get("key") != exact_cell(cell).key():
            return "it belongs to another model, text or build"
        if size != file_bytes(n_ctx, n_vocab, n_chunk):
            return f"it has {size} of {file_bytes(n_ctx, n_vocab, n_chunk)} bytes"
        if _sha256(path) != note.get("sha256"):
            return "its content has changed"
        return None

    def ensure(self, job: Job, bench: Bench, run: RunExact) -> tuple[Path, Record | None]:
        """Return a verified base for the job, and the record of the run that made it if it had to be made.

        Args:
            run: measures a cell by a command line and puts another one on record: one that gives the same
                figure and writes no file.

        That run is the reference's: it is put on record where there is none, under the lock of its cell,
        which is taken before the lock of the file by everybody (the job's own lock is held already).

        Raises:
            UsageError: it would be larger than the cap.
            EnvironmentProblem: no room on the disk.
            BaseFailedError: the f16 run crashed, hung or gave no number.
        """
        path = self.path(job.cell, bench.provenance.machine.id)
        with writing(path):
            self.dir.mkdir(parents=True, exist_ok=True)
        with self._locked(path):
            if self._usable(path, job.cell):
                return path, None
        cell = exact_cell(job.cell)
        own = cell.key() == job.cell.key()
        with nullcontext() if own else bench.store.lock(cell, wait=True):
            with self._locked(path):  # two sweeps: one computes, the other then finds it
                if self._usable(path, job.cell):
                    return path, None
                record = self._compute(job, bench, path, run)
            if not own and bench.store.load(cell) is None:
                bench.store.write(record)
        return path, record

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with writing(path):
            lock = path.with_suffix(".lock").open("a")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _usable(self, path: Path, cell: Cell) -> bool:
        if self.fault(path, cell) is not None:
            return False
        digest = _sha256(path)
        os.utime(path)  # least recently used goes first
        _VERIFIED[path] = (_stamp(path), digest)
        return True

    def _compute(self, job: Job, bench: Bench, path: Path, run: RunExact) -> Record:
        cell = exact_cell(job.cell)
        need = self.size_for(cell, job.model.gguf.n_vocab)
        self.make_room(need, keep=path)
        scratch = path.with_suffix(".part")
        plain = perplexity_argv(
            cell,
            bench.build,
            model=job.model.path,
            corpus=job.corpus.path,
            threads=bench.threads,
            anchor="off" if job.anchor is not None else None,
        )
        argv = [*plain, "--kl-divergence-base", str(scratch)]
        try:
            record = run(cell, argv, plain)
            if not record.ok:
                raise BaseFailedError(record)
            size = scratch.stat().st_size if scratch.exists() else 0
            if size != need:  # llama-perplexity does not notice a full disk
                raise EnvironmentProblem(
                    f"base logits have {size} of {need} bytes, the disk of {self.dir} is probably full",
                    "free some space or use fewer chunks",
                )
            note: dict[str, Any] = {"key": cell.key(), "sha256": _sha256(scratch), "bytes": size}
            final = [str(path) if a == str(scratch) else a for a in argv]
            note |= {"cell": cell.model_dump(mode="json"), "argv": final, "ppl": record.ppl}
            with writing(path):
                path.with_suffix(".json").write_text(json.dumps(note, indent=1), encoding="utf-8")
                scratch.replace(path)
            _VERIFIED[path] = (_stamp(path), note["sha256"])
            return record
        finally:
            scratch.unlink(missing_ok=True)

    def make_room(self, need: int, keep: Path) -> None:
        """Drop the least recently used files until `need` more bytes fit under the cap.

        Raises:
            UsageError: `need` alone is over the cap.
            EnvironmentProblem: the disk itself is too full.
        """
        if need > self.cap:
            raise UsageError(
                f"base logits need {need / 2**30:.1f} GiB, the cap is {self.cap / 2**30:.1f} GiB",
                "use fewer chunks or set TURBO_EVAL_LOGITS_GIB",
            )
        keep.unlink(missing_ok=True)
        files = sorted(self.dir.glob("*.dat"), key=lambda p: p.stat().st_mtime)
        used = self.used()
        for old in files:
            if used + need <= self.cap:
                break
            used -= old.stat().st_size
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)
        free = shutil.disk_usage(self.dir).free
        if free < need:
            raise EnvironmentProblem(
                f"base logits need {need / 2**20:.0f} MiB, {self.dir} has {free / 2**20:.0f} MiB free",
                "free some space, use fewer chunks or set TURBO_EVAL_CACHE",
            )


# A file is hashed once a process, and again when its size or modification time moves.
_VERIFIED: dict[Path, tuple[tuple[int, int], str]] = {}


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_ctime_ns


def _sha256(path: Path) -> str:
    stamp = _stamp(path)
    known = _VERIFIED.get(path)
    if known and known[0] == stamp:
        return known[1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _VERIFIED[path] = (stamp, digest)
    return digest
