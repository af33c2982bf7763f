"""The backends by name. A new one is a module here and a line in BACKENDS."""

from __future__ import annotations

from turbo_eval.errors import UsageError
from turbo_eval.llama.backends.base import Backend
from turbo_eval.llama.backends.cpu import Cpu
from turbo_eval.llama.backends.cuda import Cuda
from turbo_eval.llama.backends.metal import Metal
from turbo_eval.llama.backends.vulkan import Vulkan

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Cpu(),
        Metal(),
        Cuda(),
        Vulkan(),
    )
}


def backend(name: str) -> Backend:
    """Look one up.

    Raises:
        UsageError: there is no such backend.
    """
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name}", f"choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def cmake_options(name: str) -> dict[str, str]:
    """CMake options that turn one backend on and all others off."""
    own = backend(name)
    switches = {b.switch: "ON" if b is own else "OFF" for b in BACKENDS.values() if b.switch}
    return switches | dict(own.cmake)


def of_libraries(names: str) -> str:
    """The backend that a folder of llama.cpp binaries is for, told from its libraries' names."""
    return next((b.name for b in reversed(BACKENDS.values()) if b.library and b.library in names), "cpu")


def first_here() -> str:
    """The backend to take on this machine where none is named: a GPU's if there is one."""
    gpus = (b.name for b in BACKENDS.values() if b.gpu and b.is_here())
    return next(gpus, "cpu")
