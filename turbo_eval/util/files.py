"""Files written whole or not at all, locked, hashed; and what is remembered of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.util.paths import cache_dir

CHUNK = 1 << 20  # bytes read at a time

OnBytes = Callable[
    [int], None
]  # told how many bytes arrived since the last call; negative when it starts over


@contextmanager
def transfer_bar(label: str, total: int | None) -> Iterator[OnBytes]:
    """A progress bar on stderr; where that is no terminal, one line when it is over."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
    if not console.is_terminal:
        console.print(f"{label}: done", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Hold `target` against other turbo-eval processes; the kernel lets go when we die."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        yield


@contextmanager
def atomic_write(target: Path) -> Iterator[BinaryIO]:
    """Write beside `target`, then rename: readers see the old file or the new one, whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"no space left on the disk for {path}", "free some and run the same command again"
            ) from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise EnvironmentProblem(
                f"{path} is not writable: {error.strerror}", "fix its permissions or use --results"
            ) from None
        if error.errno == errno.ENOENT:
            raise UsageError(f"the folder of {path} does not exist", "make it first") from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{path} cannot be a folder, a file is in the way", "name another") from None
        if error.errno == errno.EISDIR:
            raise UsageError(f"{path} is a folder", "name a file") from None
        raise


def require_space(folder: Path, need: int) -> None:
    """Refuse a transfer of `need` bytes that cannot fit.

    Raises:
        EnvironmentProblem: less than that is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise EnvironmentProblem(
            f"{folder} has {free / 1e6:.0f} MB free and {need / 1e6:.0f} MB are needed",
            "free space or set TURBO_EVAL_CACHE to a larger disk",
        )


class _Told:
    """A stream that says how far it was read."""

    def __init__(self, stream: BinaryIO, on_bytes: OnBytes) -> None:
        self._stream, self._on_bytes = stream, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        count = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self._on_bytes(count)
        return int(count)


def sha256_of(path: Path, on_bytes: OnBytes | None = None) -> str:
    """Hex sha256 of a file, read now."""
    with path.open("rb") as stream:
        source = _Told(stream, on_bytes) if on_bytes else stream
        return hashlib.file_digest(source, "sha256").hexdigest()


class FileMemory:
    """Facts about files, kept while (path, size, mtime, inode) stay the same."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_dir() / "files"

    def _place(self, path: Path) -> tuple[Path, list[object]]:
        real = path.resolve()
        stat = real.stat()
        key = hashlib.sha256(str(real).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self._folder / f"{key}.json", [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino]

    def recall(self, path: Path) -> dict[str, object]:
        """What is known of the file as it is now; empty if nothing."""
        place, identity = self._place(path)
        try:
            stored = json.loads(place.read_text())
        except (OSError, ValueError):
            return {}
        return dict(stored["facts"]) if stored.get("identity") == identity else {}

    def remember(self, path: Path, **facts: object) -> None:
        """Add facts. A cache that can't be written is no error: the facts are computed again."""
        place, identity = self._place(path)
        known = self.recall(path) | facts
        try:
            with atomic_write(place) as stream:
                stream.write(json.dumps({"identity": identity, "facts": known}).encode())
        except OSError:
            pass

    def find(self, sha256: str) -> Path | None:
        """A file that is known to have this content, and unchanged since it was hashed."""
        for place in self._folder.glob("*.json"):
            try:
                stored = json.loads(place.read_text())
                if stored["facts"].get("sha256") == sha256:
                    path = Path(stored["identity"][0])
                    if self.recall(path).get("sha256") == sha256:
                        return path
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        return None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, remembered by (path, size, mtime, inode)."""
    memory = FileMemory()
    known = memory.recall(path).get("sha256")
    if isinstance(known, str):
        return known
    size = path.stat().st_size
    if size > 64 * CHUNK:
        with transfer_bar(f"sha256 of {path.name}", size) as on_bytes:
            value = sha256_of(path, on_bytes)
    else:
        value = sha256_of(path)
    memory.remember(path, sha256=value)
    return value
