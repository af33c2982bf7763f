"""Vulkan: GPUs of any maker, and llvmpipe, a driver that computes on the CPU, for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama.backends import vulkan_loader
from turbo_eval.llama.backends.base import Backend, Card, Share
from turbo_eval.llama.toolchain import Tool, first_line

_VISIBLE = "GGML_VK_VISIBLE_DEVICES"
_HEADERS = {"vulkan/vulkan.hpp": "libvulkan-dev", "spirv/unified1/spirv.hpp": "spirv-headers"}
_INSTALL = "install it, e.g. `apt-get install glslc libvulkan-dev spirv-headers`, or set VULKAN_SDK"


class Vulkan(Backend):
    name = "vulkan"
    title = "Vulkan"
    switch = "GGML_VULKAN"
    library = "ggml-vulkan"
    registries = ("Vulkan",)
    gpu = True

    def toolchain(self, archs: str) -> dict[str, str]:
        found = {"Vulkan_GLSLC_EXECUTABLE": str(glslc().path)}
        _headers()
        return found

    def compiler(self) -> str:
        return glslc().version

    def needs(self) -> dict[str, Callable[[], str]]:
        return {"glslc": lambda: glslc().shown(), "Vulkan headers": _headers, "Vulkan device": _devices}

    def is_here(self) -> bool:
        return bool(vulkan_loader.visible())

    def cards(self) -> list[Card]:
        """Discrete GPUs: the others come with the processor, whose name stands for them."""
        found = (device for device in vulkan_loader.visible() if device.kind == "discrete GPU")
        return [Card(device.name, device.memory_gib) for device in found]

    def memory_gib(self, machine_gib: float) -> float:
        found = vulkan_loader.visible()
        if len(found) != 1:
            raise UsageError(
                f"this process sees {len(found)} Vulkan devices, and a worker is for one",
                f"start one worker each, with {_VISIBLE}=0, =1, …",
            )
        own = found[0].kind == "discrete GPU"
        return found[0].memory_gib if own else min(machine_gib, found[0].memory_gib)

    def shares(self, jobs: int, cores: int, threads: int | None) -> list[Share]:
        """One device each."""
        found = vulkan_loader.visible()
        if jobs > len(found):
            raise UsageError(
                f"{jobs} cells at a time need {jobs} Vulkan devices, this machine has {len(found)}",
                f"use --jobs {len(found)}"
                if found
                else f"set {_VISIBLE} to one that `turbo-eval doctor` lists",
            )
        each = min(threads or cores, max(1, cores // jobs))
        return [Share(each, {_VISIBLE: str(device.index)}) for device in found[:jobs]]


def glslc() -> Tool:
    """The shader compiler, from PATH or $VULKAN_SDK.

    Raises:
        EnvironmentProblem: there is none.
    """
    sdk = os.environ.get("VULKAN_SDK")
    for place in (f"{sdk}/bin/glslc" if sdk else None, shutil.which("glslc")):
        if place and Path(place).is_file():
            return Tool("glslc", Path(place), f"glslc {first_line(Path(place))}".removesuffix(" "))
    raise EnvironmentProblem(
        "the Vulkan build needs glslc, and there is none on PATH or in $VULKAN_SDK", _INSTALL
    )


def _headers() -> str:
    """The headers of Vulkan and of SPIR-V, as the C++ compiler finds them.

    Raises:
        EnvironmentProblem: it doesn't.
    """
    sdk = os.environ.get("VULKAN_SDK")
    include = [f"-I{sdk}/include"] if sdk else []
    for header, package in _HEADERS.items():
        compiler = os.environ.get("CXX") or "c++"
        done = subprocess.run(
            [compiler, *include, "-E", "-x", "c++", "-", "-o", os.devnull],
            input=f"#if !__has_include(<{header}>)\n#error none\n#endif\n",
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise EnvironmentProblem(f"the Vulkan build needs {header}, of {package}", _INSTALL)
    return "vulkan.hpp, spirv.hpp"


def _devices() -> str:
    """Every device of this machine, with its number.

    Raises:
        EnvironmentProblem: there is none.
    """
    found = vulkan_loader.devices()
    if not found:
        raise EnvironmentProblem(
            "no Vulkan driver lists a device", "install one, e.g. `apt-get install mesa-vulkan-drivers`"
        )
    seen = vulkan_loader.visible()
    unused = f"; none is taken unless {_VISIBLE} names it" if not seen else ""
    return "; ".join(f"{device.index}: {device.shown()}" for device in found) + unused
