"""Collect what a number is measured with: the build, this machine, the packages."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from turbo_eval import __version__
from turbo_eval.errors import TurboEvalError
from turbo_eval.llama import patches
from turbo_eval.llama.backends import BACKENDS
from turbo_eval.llama.build import Build
from turbo_eval.records.provenance import Machine, Provenance
from turbo_eval.util import paths
from turbo_eval.util.git import git

# The instruction sets that ggml's CPU code chooses by, as Linux and macOS spell them.
_FEATURES = {
    *("avx", "avx2", "avx_vnni", "f16c", "fma", "bmi2", "ssse3"),
    *("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "sve", "sve2", "sme", "bf16"),
}
_PACKAGES = ("llama-cpp-python", "gguf", "numpy", "pandas", "datasets", "huggingface_hub")


def collect(build: Build) -> Provenance:
    """Describe `build` and this machine."""
    project = paths.project()
    return Provenance(
        backend=build.backend,
        pin=build.pin,
        series=patches.series_sha256() if build.stamp and build.patched else "",
        tree=build.tree,
        dirty=build.dirty,
        compiler=build.compiler,
        flags=build.flags,
        machine=machine(),
        packages=_packages(),
        harness=harness(),
        types=project.settings.types if project is not None else {},
    )


@cache
def machine() -> Machine:
    """Describe this machine."""
    cpu, features = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = _gpu()
    digest = hashlib.sha256(repr((cpu, features, cores, gpu)).encode()).hexdigest()[:6]
    slug = re.sub(r"\b(processor|cpu|core|with|\d+-core)\b|\((r|tm)\)", " ", cpu.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", slug).strip("-")[:40].strip("-") or "cpu"
    return Machine(
        id=f"{slug}-{cores}c-{digest}",
        cpu=cpu,
        features=features,
        cores=cores,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        os=_os(),
        gpu=gpu,
    )


def _cpu() -> tuple[str, tuple[str, ...]]:
    if sys.platform == "darwin":
        name = _ask("sysctl", "-n", "machdep.cpu.brand_string")
        flags = set(re.findall(r"hw\.optional\.arm\.FEAT_(\w+): 1", _ask("sysctl", "hw.optional.arm")))
        renamed = {"DotProd": "asimddp", "I8MM": "i8mm", "BF16": "bf16", "SME": "sme"}
        return name or platform.machine(), tuple(sorted(renamed[flag] for flag in flags & renamed.keys()))
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags_line = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    present = set(flags_line[1].split()) if flags_line else set()
    return model[1].strip() if model else platform.machine(), tuple(sorted(present & _FEATURES))


def _os() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}"


def _gpu() -> str:
    """Names of the cards; one that several backends know is named by the first of them."""
    named: list[str] = []
    for backend in BACKENDS.values():
        known = set(named)
        named += [card.name for card in backend.cards() if card.name not in known]
    return ", ".join(named)


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def harness() -> str:
    """This turbo-eval: the version of the package, in a clone with the commit that is checked out."""
    release = __version__.partition("+")[0]
    root = paths.shipped()
    if not (root / ".git").exists():  # installed: the version says it all
        return __version__
    try:
        commit = git("rev-parse", "--short=12", "HEAD", cwd=root).strip()
        edited = git("status", "--porcelain", "--", "turbo_eval", cwd=root).strip()
    except TurboEvalError:
        return __version__
    return f"{release}+{commit}{'.edited' if edited else ''}"
