"""cmake, ninja and compilers: which one, recent enough or not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem

# cmake: `--fresh` and CUDA's "native" architecture came with 3.24.
MINIMUM = {"cmake": (3, 24), "ninja": (1, 10)}
NVCC_BY_DEFAULT = Path("/usr/local/cuda/bin/nvcc")  # where the toolkit's installer puts it


@dataclass(frozen=True)
class Tool:
    """An executable; `version` is the first line it prints about itself."""

    name: str
    path: Path
    version: str


def _candidates(name: str) -> list[Path]:
    on_path = shutil.which(name)
    beside_python = Path(sys.executable).parent / name
    return [Path(place) for place in (on_path, beside_python) if place and Path(place).is_file()]


def first_line(path: Path) -> str:
    """First line of `path --version`, "" if it can't be run."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def find(name: str) -> Tool:
    """cmake or ninja, from PATH or the venv.

    Raises:
        EnvironmentProblem: none, or only an older one.
    """
    minimum = MINIMUM[name]
    wanted = ".".join(map(str, minimum))
    seen = "none is installed"
    for path in _candidates(name):
        line = first_line(path)
        match = re.search(r"(\d+)\.(\d+)", line)
        if match and (int(match[1]), int(match[2])) >= minimum:
            return Tool(name, path, line)
        seen = f"{path} is {line or 'not runnable'}"
    raise EnvironmentProblem(
        f"{name} {wanted} or newer is needed and {seen}",
        f"run `{sys.executable} -m pip install {name}`",
    )


def cxx() -> Tool:
    """The C++ compiler cmake will take: $CXX, else c++, g++ or clang++.

    Raises:
        EnvironmentProblem: there is none.
    """
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found and (line := first_line(Path(found))):
            return Tool("c++", Path(found), line)
    raise EnvironmentProblem(
        f"no C++ compiler ({asked or 'c++, g++, clang++'}) is installed",
        "install one, e.g. `apt-get install g++` or `xcode-select --install`",
    )


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


def require_metal() -> None:
    """Metal exists on macOS only, and its compiler in the command line tools.

    Raises:
        EnvironmentProblem: not here.
    """
    if sys.platform != "darwin":
        raise EnvironmentProblem(
            f"the Metal build needs macOS, this is {sys.platform}",
            "build for the CPU here",
        )
