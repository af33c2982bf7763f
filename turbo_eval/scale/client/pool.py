"""`local:N`: a scheduler and N workers on this machine, one a device, for as long as a sweep takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama.backends import backend
from turbo_eval.llama.backends.base import Share
from turbo_eval.llama.provenance import machine
from turbo_eval.util.process import die_with_parent

_START_SECONDS = 60.0
SCHEDULER = (sys.executable, "-m", "distributed.cli.dask_scheduler")
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
    with started([*command, *options], folder / "scheduler.log", {}) as process:
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
            processes: list[subprocess.Popen[bytes]] = []
            try:
                for number, part in enumerate(parts):
                    command = [sys.executable, "-m", "turbo_eval", "worker", address, "--backend", name]
                    command += ["--threads", str(part.threads)]
                    command += ["--bin-dir", str(bin_dir)] if bin_dir else []
                    processes.append(_start(command, folder / f"worker-{number}.log", part.env))
                yield address
            finally:
                end(processes)


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
            env=os.environ | env,
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
