"""CUDA: NVIDIA's compiler, and the GPUs that nvidia-smi lists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama.backends.base import Backend, Card, Share
from turbo_eval.llama.toolchain import Tool

NVCC_BY_DEFAULT = Path("/usr/local/cuda/bin/nvcc")  # where the toolkit's installer puts it
# No device to ask: one generation as PTX for everything newer, and the data-centre one natively.
ARCHS_WITHOUT_GPU = "80-virtual;90-real"


class Cuda(Backend):
    name = "cuda"
    title = "CUDA"
    switch = "GGML_CUDA"
    # Without all pairs compiled in, a missing K × V pair silently runs on the CPU.
    cmake = {"GGML_CUDA_FA_ALL_QUANTS": "ON"}  # noqa: RUF012
    library = "ggml-cuda"
    registries = ("CUDA", "ROCm", "MUSA")
    gpu = True

    def toolchain(self, archs: str) -> dict[str, str]:
        compiler = nvcc()
        native = "native" if has_nvidia_gpu() else ARCHS_WITHOUT_GPU
        return {"CMAKE_CUDA_COMPILER": str(compiler.path), "CMAKE_CUDA_ARCHITECTURES": archs or native}

    def compiler(self) -> str:
        return nvcc().version

    def needs(self) -> dict[str, Callable[[], str]]:
        return {"nvcc": lambda: nvcc().shown()}

    def is_here(self) -> bool:
        return bool(self.cards())

    def cards(self) -> list[Card]:
        """As nvidia-smi lists them, those that CUDA_VISIBLE_DEVICES leaves."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not shutil.which("nvidia-smi") or (visible is not None and not visible.strip()):
            return []
        chosen = () if visible is None else ("-i", visible)
        query = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
        try:
            done = subprocess.run(
                ["nvidia-smi", *chosen, *query],
                capture_output=True,
                text=True,
                timeout=20,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines()] if done.returncode == 0 else []
        return [Card(row[0].strip(), round(float(row[1]) / 1024, 1)) for row in rows if len(row) == 2]

    def memory_gib(self, machine_gib: float) -> float:
        cards = self.cards()
        if not cards:
            raise UsageError("this process sees no NVIDIA GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
        if len(cards) > 1:
            raise UsageError(
                f"this process sees {len(cards)} GPUs, and a worker is for one",
                "start one worker each, with CUDA_VISIBLE_DEVICES=0, =1, …",
            )
        return cards[0].memory_gib

    def shares(self, jobs: int, cores: int, threads: int | None) -> list[Share]:
        """One GPU each."""
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
        names = visible if visible != [""] else [str(number) for number in range(len(self.cards()))]
        if jobs > len(names):
            raise UsageError(
                f"{jobs} cells at a time need {jobs} GPUs, this machine has {len(names)}",
                f"use --jobs {len(names)}" if names else "check nvidia-smi",
            )
        each = min(threads or cores, max(1, cores // jobs))
        return [Share(each, {"CUDA_VISIBLE_DEVICES": name}) for name in names[:jobs]]


def nvcc() -> Tool:
    """The CUDA compiler: $CUDACXX, PATH, $CUDA_HOME or $CUDA_PATH, /usr/local/cuda.

    Raises:
        EnvironmentProblem: there is none.
    """
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    places += [f"{home}/bin/nvcc" for key in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(key))]
    places.append(str(NVCC_BY_DEFAULT))
    for place in places:
        if not place or not Path(place).is_file():
            continue
        done = subprocess.run([place, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        release = re.search(r"release ([\d.]+)", done.stdout)
        if done.returncode == 0 and release:
            return Tool("nvcc", Path(place), f"nvcc {release[1]}")
    raise EnvironmentProblem(
        "the CUDA build needs nvcc, and there is none on PATH, in $CUDA_HOME or in /usr/local/cuda",
        "install the CUDA toolkit or set CUDACXX",
    )


def has_nvidia_gpu() -> bool:
    """Is there a device that "native" could mean?"""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return False
    done = subprocess.run([smi, "-L"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode == 0 and "GPU" in done.stdout
