"""Files from URLs: resumed, verified, never half there."""

from __future__ import annotations

import time
from pathlib import Path

import httpx2

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.inputs import package_index
from turbo_eval.inputs.package_index import RemoteFile
from turbo_eval.util.files import FileMemory, OnBytes, require_space, sha256_of

BLOCK = 1 << 16  # bytes of a connection read at a time: what is lost when it breaks
ATTEMPTS = 4


class HashMismatch(EnvironmentProblem):
    """Content is not what was pinned."""


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
