"""llama-cpp-python without a llama.cpp of its own: it loads the libraries of our builds."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama import source
from turbo_eval.util import python

NAME, _, VERSION = source.SDIST_REQUIREMENT.partition("==")


def installed() -> bool:
    """Is the version here that fits the pin?"""
    try:
        return version(NAME) == VERSION
    except PackageNotFoundError:
        return False


def require() -> None:
    """For the metrics that generate text.

    Raises:
        EnvironmentProblem: not installed, or another version.
    """
    if not installed():
        raise EnvironmentProblem(
            f"generating text needs {source.SDIST_REQUIREMENT}, which is not installed",
            "run `turbo-eval bindings`",
        )


def install() -> bool:
    """Install it from the sdist that also carries the pinned llama.cpp; False if it was here.

    Raises:
        EnvironmentProblem: the sdist can't be had, or pip failed.
    """
    if installed():
        return False
    sdist = source.ensure_sdist()
    done = subprocess.run(
        python.command("-m", "pip", "install", "--quiet", sdist),
        env=os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if "error" in line.lower()), (said or ["no reason given"])[-1])
        raise EnvironmentProblem(
            f"pip could not install {source.SDIST_REQUIREMENT}: {reason}",
            f"see what `{sys.executable} -m pip install {sdist}` says",
        )
    return True
