"""Builds: one folder a backend under build/, stamped with what they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem


@dataclass(frozen=True)
class Build:
    """A built llama.cpp.

    Attributes:
        backend: "cpu", "metal" or "cuda"; for a foreign folder what its libraries say.
        bin_dir: executables and shared libraries.
        tree: git tree hash of the sources it was built from, uncommitted edits included;
            for a foreign folder "bin-" + a hash of its libraries and tools.
        pin: upstream commit under the patches; "" where unknown.
        dirty: the sources had edits that the series does not hold.
        compiler: e.g. "GNU 12.2.0".
        flags: CMake options that were set, "KEY=VALUE".
        stamp: hash of tree + options + compiler; "" for a foreign folder.
    """

    backend: str
    bin_dir: Path
    tree: str
    pin: str
    dirty: bool
    compiler: str
    flags: tuple[str, ...]
    stamp: str

    @classmethod
    def from_bin_dir(cls, path: Path) -> Build:
        """Describe any folder of llama.cpp binaries (unpatched upstream, a fork).

        Raises:
            UsageError: no llama-perplexity in it.
        """
        raise NotImplementedError

    def tool(self, name: str) -> Path:
        """Path of an executable, e.g. `tool("llama-perplexity")`.

        Raises:
            EnvironmentProblem: this build does not have it.
        """
        path = self.bin_dir / name
        if not path.is_file():
            raise EnvironmentProblem(
                f"the {self.backend} build has no {name} in {self.bin_dir}",
                f"run `make build-{self.backend}`",
            )
        return path


def find_build(backend: str) -> Build:
    """The finished build of a backend, as stamped.

    Raises:
        EnvironmentProblem: none, or it was interrupted.
    """
    raise NotImplementedError
