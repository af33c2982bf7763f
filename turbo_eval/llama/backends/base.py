"""What a backend of llama.cpp is to us: how it is built, where it runs, how its runs are told from the CPU's.

A new one is a module beside this with a subclass, and a line in the registry of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from turbo_eval.errors import UsageError


@dataclass(frozen=True)
class Card:
    """A device with memory of its own (GiB)."""

    name: str
    memory_gib: float


@dataclass(frozen=True)
class Share:
    """One worker's part of a machine: CPU threads, and the variables that show it its device."""

    threads: int
    env: dict[str, str]


class Backend:
    """The CPU's answers; a GPU's backend overrides what differs.

    Attributes:
        name: as users and records spell it.
        title: as sentences spell it.
        switch: CMake option that turns it on, "" for none; the switches of the others are turned off.
        cmake: further CMake options.
        library: name of its library, lib….so, by which a foreign build is recognized.
        registries: ggml's names of its device registry.
        gpu: layers are offloaded to it, and must not come back.
        repeats: two contexts with the same tokens in the same micro-batches give the same bits.
    """

    name: str = ""
    title: str = ""
    switch: str = ""
    cmake: Mapping[str, str] = {}
    library: str = ""
    registries: tuple[str, ...] = ()
    gpu: bool = False
    repeats: bool = False

    # -- build ---------------------------------------------------------------------------------------

    def toolchain(self, archs: str) -> dict[str, str]:
        """CMake options that depend on this machine, after checking that it can compile for the backend.

        Args:
            archs: device architectures asked for, "" for those at hand.

        Raises:
            EnvironmentProblem: a compiler is missing.
        """
        return {}

    def compiler(self) -> str:
        """Version of a compiler beside the C++ one, "" if there is none."""
        return ""

    def needs(self) -> dict[str, Callable[[], str]]:
        """For doctor: name of what it needs → what is installed, or the error that says what isn't."""
        return {}

    # -- run -----------------------------------------------------------------------------------------

    def device_flags(self) -> list[str]:
        """Arguments of llama.cpp's tools that put a run there, all of it."""
        return ["-ngl", "999"] if self.gpu else ["--device", "none"]

    def bench_flags(self) -> list[str]:
        """The same for llama-bench."""
        return ["-ngl", "999"] if self.gpu else ["-dev", "none"]

    def gpu_layers(self) -> int:
        """The same for llama-cpp-python: -1 for all."""
        return -1 if self.gpu else 0

    # -- devices -------------------------------------------------------------------------------------

    def is_here(self) -> bool:
        """Does this machine have a device of it?"""
        return True

    def cards(self) -> list[Card]:
        """Devices that have memory of their own and that this process may use."""
        return []

    def memory_gib(self, machine_gib: float) -> float:
        """Memory of the one device of this process.

        Raises:
            UsageError: there is none, or there are several.
        """
        return machine_gib

    def shares(self, jobs: int, cores: int, threads: int | None) -> list[Share]:
        """Divide a machine of `cores` threads among `jobs` workers so that nothing is used twice.

        Raises:
            UsageError: more workers than devices or threads.
        """
        each = threads or cores // jobs
        if each < 1 or each * jobs > cores:
            raise UsageError(
                f"{jobs} cells at a time with {max(each, 1)} threads each are more than the {cores} cores"
                " here",
                f"use at most {cores // max(each, 1)} jobs, or fewer --threads",
            )
        return [Share(each, {}) for _ in range(jobs)]
