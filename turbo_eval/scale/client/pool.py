"""`local:N`: a scheduler and N workers on this machine, one a device, for as long as a sweep takes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama.backends import backend
from turbo_eval.llama.backends.base import Share
from turbo_eval.llama.provenance import machine
from turbo_eval.util import paths, python
from turbo_eval.util.process import die_with_parent

_START_SECONDS = 60.0
SCHEDULER = tuple(python.command("-m", "distributed.cli.dask_scheduler"))
# How often a worker that ended is replaced; one that ends at once would be started for ever.
REPLACEMENTS = 3
PRELOAD = ("--preload", "turbo_eval.scale.preload")


def shares(jobs: int, name: str, threads: int | None) -> list[Share]:
    """Divide this machine among `jobs` workers of a backend so that nothing is used twice.

    Raises:
        UsageError: more workers than devices or threads.
    """
    return backend(name).shares(jobs, machine().cores, threads)


@contextmanager
def scheduler(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start Dask's own scheduler, guarded, on loopback; yields its address and process.

    Raises:
        EnvironmentProblem: it does not come up.
    """
    file = folder / "scheduler.json"
    command = [*SCHEDULER, "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    # Where nothing ends it with its parent (macOS), it ends itself when nobody asks for anything.
    command += ["--idle-timeout", "600", "--scheduler-file", str(file), *PRELOAD]
    with started([*command, *options], folder / "scheduler.log", {}, folder) as process:
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                address = str(json.loads(file.read_text())["address"])
                break
            except (OSError, ValueError, KeyError):
                if process.poll() is not None or time.monotonic() > until:
                    raise EnvironmentProblem(
                        f"Dask's scheduler did not start: {_last_line(folder / 'scheduler.log')}",
                        "try `dask scheduler` by hand",
                    ) from None
                time.sleep(0.05)
        yield address, process


@contextmanager
def pool(jobs: int, name: str, threads: int | None, bin_dir: Path | None) -> Iterator[str]:
    """Run a scheduler and `jobs` workers; yields the scheduler's address.

    Raises:
        UsageError: as `shares`.
        EnvironmentProblem: the scheduler does not start.
    """
    parts = shares(jobs, name, threads)
    with tempfile.TemporaryDirectory(prefix="turbo-eval-pool-") as scratch:
        folder = Path(scratch)
        with scheduler(folder) as (address, _):

            def start(number: int) -> subprocess.Popen[bytes]:
                command = python.command("-m", "turbo_eval", "worker", address, "--backend", name)
                command += ["--threads", str(parts[number].threads)]
                command += ["--bin-dir", str(bin_dir.resolve())] if bin_dir else []
                env = parts[number].env | _places()
                return _start(command, folder / f"worker-{number}.log", env, folder)

            processes = [start(number) for number in range(len(parts))]
            done = threading.Event()
            watch = threading.Thread(target=_replace_lost, args=(processes, start, done), daemon=True)
            watch.start()
            try:
                yield address
            finally:
                done.set()
                watch.join()
                end(processes)


def _places() -> dict[str, str]:
    """What a child in another folder has to be told: where project and files are."""
    found = {}
    for name in ("TURBO_EVAL_CACHE", "TURBO_EVAL_RESULTS"):
        if value := os.environ.get(name):
            found[name] = str(Path(value).expanduser().resolve())
    project = paths.project()
    root = project.folder if project is not None else paths.checkout()
    return found | ({"TURBO_EVAL_ROOT": str(root)} if root is not None else {})


def _replace_lost(
    processes: list[subprocess.Popen[bytes]],
    start: Callable[[int], subprocess.Popen[bytes]],
    done: threading.Event,
) -> None:
    """Start a worker anew that was killed or crashed, until `done`."""
    left = [REPLACEMENTS] * len(processes)
    while not done.wait(0.5):
        for number, process in enumerate(processes):
            if process.poll() is not None and left[number]:
                left[number] -= 1
                processes[number] = start(number)


@contextmanager
def started(
    command: Sequence[str], log: Path, env: dict[str, str], cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards; its output goes to `log`, `env` is laid over ours."""
    process = _start(command, log, env, cwd)
    try:
        yield process
    finally:
        end([process])


def _start(
    command: Sequence[str], log: Path, env: dict[str, str], cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=python.environment(os.environ | env),
            cwd=cwd,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends the rest
            preexec_fn=die_with_parent,
        )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to stop, and make those that don't."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "it said nothing"
