"""What is here, what is missing, and the command that fixes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, TurboEvalError
from turbo_eval.inputs import corpora, models
from turbo_eval.llama import bindings, patches, provenance, source, toolchain
from turbo_eval.llama import build as builds
from turbo_eval.llama.backends import BACKENDS
from turbo_eval.util import paths, python
from turbo_eval.util.git import git
from turbo_eval.util.project import Project


@dataclass(frozen=True)
class Item:
    """One line of the report. `required`: without it there is no CPU sweep."""

    section: str
    name: str
    ok: bool
    detail: str
    fix: str = ""
    required: bool = False


def examine() -> Iterator[Item]:
    """Look at everything, change nothing, stay off the network."""
    yield from _toolchain()
    yield from _source()
    yield from _builds()
    yield _bindings()
    yield from _assets()
    yield _disk()


def _attempt(
    section: str, name: str, look: Callable[[], str], fix: str = "", *, required: bool = False
) -> Item:
    try:
        return Item(section, name, True, look(), required=required)
    except TurboEvalError as error:
        return Item(section, name, False, error.message, fix or error.next_step, required)


def _toolchain() -> Iterator[Item]:
    section = "toolchain"
    here = provenance.machine()
    yield Item(section, "machine", True, f"{here.cpu}, {here.cores} cores, {here.memory_gib} GiB, {here.os}")
    yield Item(section, "machine id", True, here.id)
    python = ".".join(map(str, sys.version_info[:3]))
    yield Item(section, "python", sys.version_info >= (3, 11), python, "install Python 3.11", required=True)
    yield _attempt(section, "git", lambda: git("--version", cwd=Path.cwd()).strip(), required=True)
    for name in toolchain.MINIMUM:
        yield _attempt(section, name, lambda name=name: toolchain.find(name).shown(), required=True)  # type: ignore[misc]
    yield _attempt(section, "C++ compiler", lambda: toolchain.cxx().shown(), required=True)
    ccache = shutil.which("ccache")
    yield Item(
        section,
        "ccache",
        bool(ccache),
        ccache or "not installed: rebuilds after a patch change take longer",
        "install ccache (optional)",
    )
    for backend in BACKENDS.values():
        for name, ask in backend.needs().items():
            yield _attempt(section, name, ask, f"only needed for {backend.title} builds")


def _source() -> Iterator[Item]:
    section = "source"

    fill = paths.step("source", "source")

    def upstream() -> str:
        now = source.state()
        if not now.head:
            raise EnvironmentProblem("llama.cpp/ is empty", fill)
        if now.head != now.pin:
            raise EnvironmentProblem(f"llama.cpp/ is at {now.head[:12]}, the pin is {now.pin[:12]}", fill)
        if not now.clean:
            raise EnvironmentProblem(
                "llama.cpp/ has local changes", f"move them to {paths.worktree_dir()} and check it out anew"
            )
        return f"at the pin {now.pin}, pristine"

    def series() -> str:
        now = patches.status()
        if not now.head:
            raise EnvironmentProblem(f"{len(now.patches)} patches, not applied", "turbo-eval patches apply")
        if now.dirty or not now.applied or now.stopped:
            raise EnvironmentProblem(
                f"{len(now.patches)} patches: {now.summary()}",
                "turbo-eval patches refresh (keep the edits) or turbo-eval patches apply --force (drop them)"
                if now.dirty
                else "turbo-eval patches apply",
            )
        return f"{len(now.patches)} patches applied, tree {now.tree}"

    project = paths.project()

    def own(project: Project) -> str:
        edits = ", with edits that are not committed" if source.own_edits(project) else ""
        return f"{project.folder} at {source.pin()}{edits}"

    if project is not None and project.here:
        yield _attempt(section, "this checkout", lambda: own(project), required=True)
        if not project.settings.patches:
            return
    else:
        yield _attempt(section, "upstream", upstream, required=True)
    yield _attempt(section, "patches", series)


def _builds() -> Iterator[Item]:
    for backend in BACKENDS:

        def look(backend: str = backend) -> str:
            found = builds.find_build(backend)
            edits = ", with edits outside the series" if found.dirty else ""
            if not found.current():
                raise EnvironmentProblem(
                    f"tree {found.tree[:12]}, and the sources were changed since",
                    paths.step(f"build-{backend}", f"build {backend}"),
                )
            return f"tree {found.tree[:12]}{edits}, {found.compiler}{_devices(found)}"

        yield _attempt("builds", backend, look, required=backend == "cpu")


def _devices(build: builds.Build) -> str:
    """What the build itself finds to compute on, beside the CPU."""
    try:
        done = subprocess.run(
            [build.tool("llama-bench"), "--list-devices"],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired, TurboEvalError):
        return ", devices: cannot be asked"
    listed = done.stdout.partition("Available devices:")[2].splitlines()
    names = [line.strip() for line in listed if line.strip() and "none" not in line]
    return f", devices: {'; '.join(names)}" if names else ", devices: CPU only"


_LOADED = """
import llama_cpp
print(llama_cpp.llama_cpp._lib._name)
print(llama_cpp.llama_print_system_info().decode())
"""


def bindings_environment(build: builds.Build) -> dict[str, str]:
    """Environment in which llama-cpp-python loads `build`'s libllama."""
    return dict(os.environ) | {"LLAMA_CPP_LIB_PATH": str(build.bin_dir)}


def _bindings() -> Item:
    """Which libllama does llama-cpp-python load? Asked in a process of its own: it may crash."""
    section, name = "bindings", bindings.NAME
    try:
        have = version(name)
    except PackageNotFoundError:
        return Item(section, name, False, "not installed", "turbo-eval bindings")
    try:
        build = builds.find_build("cpu")
    except EnvironmentProblem as error:
        return Item(section, name, False, f"{have}, but {error.message}: nothing to load", error.next_step)
    done = subprocess.run(
        python.command("-c", _LOADED),
        capture_output=True,
        text=True,
        timeout=120,
        env=bindings_environment(build),
        stdin=subprocess.DEVNULL,
    )
    said = done.stdout.splitlines()
    if done.returncode != 0 or len(said) < 2:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Item(
            section,
            name,
            False,
            f"{have} does not load {build.bin_dir}: {reason}",
            paths.step("build-cpu", "build cpu"),
        )
    return Item(section, name, True, f"{have} loads {said[0]} ({said[1].strip(' |')})")


def _assets() -> Iterator[Item]:
    for name in models.registry():
        yield _attempt(
            "models",
            name,
            lambda name=name: str(models.resolve_model(name, download=False).path),  # type: ignore[misc]
            f"turbo-eval models get {name}",
        )
    for name in corpora.registry():
        yield _attempt(
            "corpora",
            name,
            lambda name=name: str(corpora.resolve_corpus(name, download=False).path),  # type: ignore[misc]
            f"turbo-eval corpora get {name}",
        )


def _disk() -> Item:
    folder = paths.cache_dir()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return Item(
        "disk", "cache", free > 2, f"{folder}, {free:.1f} GB free", "free space or set TURBO_EVAL_CACHE"
    )
