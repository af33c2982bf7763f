"""cmake and ninja, run on sources of llama.cpp: configure, compile, and the first error in words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama import toolchain
from turbo_eval.util import paths

OnStep = Callable[[int, int, str], None]  # steps done, steps in all, what was made


class BuildFailed(EnvironmentProblem):
    """cmake or the compiler failed; `reason` is their first error."""

    def __init__(self, message: str, reason: str, log: Path) -> None:
        super().__init__(f"{message}: {reason}", f"read {log}")
        self.reason = reason


def environment() -> dict[str, str]:
    """For cmake and ninja."""
    env = dict(os.environ)
    # Cache hits across clones and worktrees: paths below the clone count as relative.
    project = paths.project()
    env.setdefault("CCACHE_BASEDIR", str(project.folder if project else paths.repo_root()))
    env.setdefault("CCACHE_NOHASHDIR", "1")
    # A venv's ninja is not on PATH when its python is called by its full name.
    env["PATH"] = f"{env.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    return env


def configure(sources: Path, folder: Path, options: Mapping[str, str], compiler: str, log: Path) -> None:
    """Have cmake write `folder` for ninja.

    Args:
        compiler: version; another one than last time starts the folder's cache anew.

    Raises:
        BuildFailed: cmake stopped.
    """
    cmake, ninja = toolchain.find("cmake").path, toolchain.find("ninja").path
    cache, note = folder / "CMakeCache.txt", folder / "compiler.txt"
    stale = cache.is_file() and (
        f"CMAKE_HOME_DIRECTORY:INTERNAL={sources}\n" not in cache.read_text(errors="replace")
        or not note.is_file()
        or note.read_text() != compiler
    )
    if stale:  # the clone was moved, or another compiler: cmake would keep or refuse the old ones
        cache.unlink()
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(compiler)
    command: list[str | Path] = [cmake, "-S", sources, "-B", folder, "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", *(f"-D{key}={value}" for key, value in options.items())]
    with log.open("wb") as stream:
        code = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment()
        ).returncode
    if code:
        raise BuildFailed("cmake could not configure", first_error(log), log)


def compile(
    folder: Path, targets: Sequence[str], jobs: int, log: Path, what: str, on_step: OnStep | None = None
) -> None:
    """Have ninja make `targets`; its output goes to the end of `log`.

    Args:
        what: is built, for the error's sentence.

    Raises:
        BuildFailed: a compiler stopped.
    """
    command: list[str | Path] = [toolchain.find("ninja").path, "-C", folder, f"-j{jobs}", *targets]
    with (
        log.open("ab") as stream,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment() | {"NINJA_STATUS": "[%f/%t] "},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                stream.write(raw)
                step = re.match(rb"\[(\d+)/(\d+)\] (.*)", raw)
                if step and on_step:
                    made = step[3].decode(errors="replace").rsplit("/", 1)[-1]
                    on_step(int(step[1]), int(step[2]), made)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise BuildFailed(f"the {what} build failed", first_error(log), log)


def compile_shown(
    folder: Path, targets: Sequence[str], jobs: int, log: Path, what: str, console: Console
) -> None:
    """`compile` with a bar on a terminal, a line every tenth of the way elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    live = console.is_terminal
    started, told = time.monotonic(), 0
    with Progress(*columns, console=console, disable=not live) as bar:
        task = bar.add_task(f"build {what}", total=None, what="")

        def show(done: int, total: int, made: str) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, what=made[:40])
            if not live and done * 10 // total > told:
                told = done * 10 // total
                spent = time.monotonic() - started
                console.print(f"build {what}: {done}/{total}, {spent:.0f} s", highlight=False)

        compile(folder, targets, jobs, log, what, show)


def first_error(log: Path) -> str:
    """The first error that a log tells of."""
    lines = log.read_text(errors="replace").splitlines()
    marks = ("error:", "CMake Error", "ninja: error", "fatal error")
    hits = [index for index, line in enumerate(lines) if any(mark in line for mark in marks)]
    if not hits:
        return lines[-1].strip() if lines else "it said nothing"
    first = hits[0]
    # "CMake Error at file:line (command):" is followed by the message itself, in paragraphs
    block = lines[first : first + (8 if "CMake" in lines[first] else 1)]
    text = " ".join(line.strip() for line in block if line.strip())
    return text[:300]
