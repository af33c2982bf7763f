"""cmake, ninja and the C++ compiler: which one, recent enough or not."""

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


@dataclass(frozen=True)
class Tool:
    """An executable; `version` is the first line it prints about itself."""

    name: str
    path: Path
    version: str

    def shown(self) -> str:
        """For people."""
        return f"{self.version} ({self.path})"


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
