"""Files from URLs: resumed, verified, never half there; and sha256 of big files, remembered."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import httpx2
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.inputs import package_index
from turbo_eval.inputs.package_index import RemoteFile
from turbo_eval.util.paths import cache_dir

CHUNK = 1 << 20  # of files
BLOCK = 1 << 16  # of connections: what is lost when one breaks
ATTEMPTS = 4

OnBytes = Callable[
    [int], None
]  # told how many bytes arrived since the last call; negative when it starts over


class HashMismatch(EnvironmentProblem):
    """Content is not what was pinned."""


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
    with target.with_name(target.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
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


def sha256_of(path: Path, on_bytes: OnBytes | None = None) -> str:
    """Hex sha256 of a file, read now."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
            if on_bytes:
                on_bytes(len(block))
    return digest.hexdigest()


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


class _Meter:
    """Turns positions in a file into steps of a progress bar."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes, self._position = on_bytes, 0

    def at(self, position: int) -> None:
        self._on_bytes(position - self._position)
        self._position = position


def fetch(remote: RemoteFile, target: Path, *, on_bytes: OnBytes = lambda _: None) -> Path:
    """Download `remote` to `target`, picking up a partial file of an earlier try.

    The partial file lies beside the target as `<name>.part`; the target appears only when its
    sha256 is the stated one. A wrong hash after resuming costs one clean restart.

    Raises:
        HashMismatch: the content is wrong.
        EnvironmentProblem: no connection after several tries, or an HTTP error.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    meter, resumed = _Meter(on_bytes), False
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(2**attempt, 8) * 0.25)
        try:
            resumed = _transfer(remote, part, meter) or resumed
        except (httpx2.TransportError, httpx2.StreamError) as error:
            failure = error
            continue
        actual = sha256_of(part)
        if remote.sha256 is None or actual == remote.sha256:
            part.replace(target)
            FileMemory().remember(target, sha256=actual)
            return target
        meter.at(0)
        part.unlink()
        if not resumed:
            raise HashMismatch(
                f"{remote.filename} has sha256 {actual}, expected {remote.sha256}",
                "it was deleted: try again, and if it stays so distrust the index",
            )
        resumed = False
    raise EnvironmentProblem(
        f"{remote.filename} could not be downloaded ({type(failure).__name__}: {failure})",
        "check the network and run the same command again: it resumes",
    ) from failure


def _transfer(remote: RemoteFile, part: Path, meter: _Meter) -> bool:
    """Append what is missing to `part`; whether anything of it was there before."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with package_index.client().get_stream(remote.url, headers=headers) as response:
        if response.status_code == 416:  # the partial file is complete, or longer than the whole
            if f"/{have}" in response.headers.get("Content-Range", ""):
                meter.at(have)
                return True
            part.unlink()
            raise httpx2.ReadError("partial file does not fit, starting over")
        if response.status_code not in (200, 206):
            raise EnvironmentProblem(
                f"{remote.filename} could not be downloaded (HTTP {response.status_code})",
                "check `pip config list`",
            )
        resuming = response.status_code == 206 and have > 0
        length = int(response.headers.get("Content-Length", 0))
        require_space(part.parent, length)
        start = have if resuming else 0
        position = start
        with part.open("ab" if resuming else "wb") as stream:
            for block in response.iter_bytes(BLOCK):
                stream.write(block)
                position += len(block)
                meter.at(position)
        if length and position - start < length:
            raise httpx2.ReadError(f"connection closed after {position - start} of {length} bytes")
        return resuming
