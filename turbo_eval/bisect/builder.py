"""llama-perplexity of any llama.cpp commit: one build folder, the results kept by tree hash."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from turbo_eval.bisect.history import History, UntestableError, bisect_dir
from turbo_eval.llama import build as builds
from turbo_eval.llama import cmake, toolchain
from turbo_eval.llama.build import Build
from turbo_eval.llama.worktree import checkout
from turbo_eval.util import paths
from turbo_eval.util.files import atomic_write
from turbo_eval.util.git import git

TARGET = "llama-perplexity"


@dataclass
class Builder:
    """Builds commits of `history.llama`.

    Attributes:
        extra: further CMake options.
        made: how many builds were run, cached ones not counted; `seconds` what they took.
    """

    history: History
    backend: str
    jobs: int
    extra: dict[str, str] = field(default_factory=dict)
    made: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        # A binary must find its libraries in the folder it was copied to.
        self._options = builds.options(self.backend) | {
            "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
            "LLAMA_BUILD_TESTS": "OFF",
            **self.extra,
        }
        self._compiler = toolchain.cxx().version

    def _folder(self, tree: str) -> Path:
        described = repr((tree, sorted(self._options.items()), self._compiler, self.backend))
        return bisect_dir() / "builds" / f"{tree[:12]}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"

    def build(self, commit: str) -> Build:
        """The build of a commit, from the cache if its tree was built before.

        Raises:
            UntestableError: it does not compile; remembered by tree as well.
        """
        tree = git("rev-parse", f"{commit}^{{tree}}", cwd=self.history.llama).strip()
        folder = self._folder(tree)
        made = Build(
            backend=self.backend,
            bin_dir=folder / "bin",
            tree=tree,
            pin=commit,
            dirty=False,
            compiler=self._compiler,
            flags=tuple(f"{key}={value}" for key, value in sorted(self._options.items())),
            stamp="",
        )
        failure = folder / "failed.txt"
        if failure.is_file():
            raise UntestableError(failure.read_text())
        if (made.bin_dir / TARGET).is_file():
            return made
        self._compile(commit, failure)
        unfinished = folder / "bin.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, exist_ok=True)
        for file in sorted((self._build_dir() / "bin").iterdir()):
            if file.name == TARGET or re.search(r"\.(so|dylib)\b|\.metal", file.name):
                shutil.copy2(file, unfinished / file.name, follow_symlinks=False)
        unfinished.rename(made.bin_dir)
        return made

    def _build_dir(self) -> Path:
        return bisect_dir() / self.backend

    def _compile(self, commit: str, failure: Path) -> None:
        source, folder = bisect_dir() / "src", self._build_dir()
        checkout(self.history.llama, source, commit)
        log = bisect_dir() / "build.log"
        started = time.monotonic()
        self.made += 1
        try:
            cmake.configure(source, folder, self._options, self._compiler, log)
            cmake.compile(folder, [TARGET], self.jobs, log, self.backend)
        except cmake.BuildFailed as error:
            if "No space left" in log.read_text(errors="replace"):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from None
            reason = f"it does not build: {error.reason[:200]}"
            with atomic_write(failure) as stream:
                stream.write(reason.encode())
            raise UntestableError(reason) from None
        finally:
            self.seconds += time.monotonic() - started

    def estimate_seconds(self) -> float | None:
        """Processor time of the main build of this backend over the jobs; None if there is no log of one."""
        log = paths.build_dir(self.backend) / ".ninja_log"
        if not log.is_file():
            return None
        lines = [line.split("\t") for line in log.read_text(errors="replace").splitlines()[1:]]
        spent = {line[3]: int(line[1]) - int(line[0]) for line in lines if len(line) == 5}
        return sum(spent.values()) / 1000 / self.jobs
