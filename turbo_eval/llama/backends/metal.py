"""Metal, on macOS."""

from __future__ import annotations

import sys
from collections.abc import Callable

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama.backends.base import Backend, Share


class Metal(Backend):
    name = "metal"
    title = "Metal"
    switch = "GGML_METAL"
    cmake = {"GGML_METAL_EMBED_LIBRARY": "ON"}  # noqa: RUF012
    library = "ggml-metal"
    registries = ("MTL", "Metal")
    gpu = True

    def toolchain(self, archs: str) -> dict[str, str]:
        if not self.is_here():
            raise EnvironmentProblem(
                f"the Metal build needs macOS, this is {sys.platform}",
                "build for the CPU here",
            )
        return {}

    def needs(self) -> dict[str, Callable[[], str]]:
        return {"metal": lambda: "macOS"} if self.is_here() else {}

    def is_here(self) -> bool:
        return sys.platform == "darwin"

    def shares(self, jobs: int, cores: int, threads: int | None) -> list[Share]:
        raise UsageError("this machine has one Metal device", "leave --jobs out")
