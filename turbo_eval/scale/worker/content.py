"""A worker's files by content: what it has, what its registry gives, what the sweep sends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, TurboEvalError
from turbo_eval.inputs import corpora, models
from turbo_eval.inputs.registry import Entry, acquire
from turbo_eval.scale import guard
from turbo_eval.scale.wire import Need
from turbo_eval.util import paths
from turbo_eval.util.files import FileMemory, file_sha256, require_space, sha256_of, writing

_SUFFIX = {"model": ".gguf", "corpus": ".txt", "anchor": ".gguf", "profile": ".gguf"}
_NAMELESS = ("anchor", "profile")  # known by their content alone


class RefusedError(TurboEvalError):
    """This worker cannot or must not run what it was asked for."""

    exit_code = 4


class Content:
    """Files of this machine.

    Args:
        folders: further places whose models and texts may be used, found by name and checked by hash.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self._folders = tuple(folders)

    def path(self, need: Need) -> Path:
        """Where content that was sent is kept."""
        return paths.cache_dir() / "content" / f"{need.sha256}{_SUFFIX[need.kind]}"

    def check(self, need: Need) -> None:
        """Refuse to work beside another file of the same name: one of the two is not what it is
        taken for.

        Raises:
            RefusedError: names the file and both hashes.
        """
        for path in self._by_name(need):
            if path.is_file() and (have := file_sha256(path)) != need.sha256:
                raise RefusedError(
                    f"its {path.name} is not the {need.kind} {need.name} of this sweep: sha256"
                    f" {have[:12]}… instead of {need.sha256[:12]}…",
                    "delete or rename it there",
                )

    def locate(self, need: Need) -> Path | None:
        """The file with this content, from the registry's source if need be; None: the sweep has to
        send it. Its sha256 was read or is remembered of an unchanged file.

        Raises:
            RefusedError: as `check`.
        """
        self.check(need)
        for path in (*self._by_name(need), self.path(need)):
            if path.is_file() and file_sha256(path) == need.sha256:
                return path
        return FileMemory().find(need.sha256) or self._from_registry(need)

    def _by_name(self, need: Need) -> list[Path]:
        if need.kind in _NAMELESS or Path(need.name).name != need.name:
            return []
        known = models if need.kind == "model" else corpora
        suffix = _SUFFIX[need.kind]
        name = need.name.removesuffix(suffix)
        files = dict.fromkeys((f"{name}{suffix}", need.name))
        return [known.cached_path(name), *(folder / file for folder in self._folders for file in files)]

    def _from_registry(self, need: Need) -> Path | None:
        if need.kind in _NAMELESS:
            return None
        known = models if need.kind == "model" else corpora
        for name, entry in known.registry().items():
            if entry.sha256 == need.sha256 or (entry.sha256 is None and name == need.name):
                return self._acquired(name, entry, known.cached_path(name), need)
        return None

    def _acquired(self, name: str, entry: Entry, target: Path, need: Need) -> Path | None:
        try:
            with guard.trusted():  # the hub's and data set libraries keep pickles of their own
                path, digest = acquire(name, entry, target)
        except EnvironmentProblem:
            return None  # no network here; the sweep has the file
        return path if digest == need.sha256 else None

    def receive(self, need: Need, offset: int, body: bytes) -> int:
        """Append a piece; returns how many bytes are here. Whole and right, it becomes content.

        Raises:
            RefusedError: the bytes do not hash to what they were announced as.
            EnvironmentProblem: the disk is full.
        """
        target = self.path(need)
        if target.is_file():
            return need.size
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        if offset == 0:
            require_space(target.parent, need.size)
            part.unlink(missing_ok=True)
        have = part.stat().st_size if part.exists() else 0
        if have != offset or offset + len(body) > need.size:
            return have
        with writing(part), part.open("ab") as stream:
            stream.write(body)
        if offset + len(body) < need.size:
            return offset + len(body)
        actual = sha256_of(part)
        if actual != need.sha256:
            part.unlink()
            raise RefusedError(
                f"the bytes sent for {need.name} have sha256 {actual[:12]}… instead of {need.sha256[:12]}…",
                "run the sweep again",
            )
        part.replace(target)
        FileMemory().remember(target, sha256=actual)
        return need.size
