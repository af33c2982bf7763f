"""`local:N`: a scheduler and N workers on this machine, one a device, for as long as a sweep takes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama.provenance import gpus, machine

_START_SECONDS = 60.0
SCHEDULER = (sys.executable, "-m", "distributed.cli.dask_scheduler")
PRELOAD = ("--preload", "turbo_eval.scale.preload")


@dataclass(frozen=True)
class Share:
    """One worker's part of this machine."""

    threads: int
    env: dict[str, str]


def shares(jobs: int, backend: str, threads: int | None) -> list[Share]:
    """Divide this machine among `jobs` workers so that nothing is used twice.

    GPUs: one each. CPU: the whole of it is one device, so `jobs` cells at a time split its threads.

    Raises:
        UsageError: more workers than GPUs or threads.
    """
    cores = machine().cores
    if backend == "metal":
        raise UsageError("this machine has one Metal device", "leave --jobs out")
    if backend == "cuda":
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
        names = visible if visible != [""] else [str(number) for number in range(len(gpus()))]
        if jobs > len(names):
            raise UsageError(
                f"{jobs} cells at a time need {jobs} GPUs, this machine has {len(names)}",
                f"use --jobs {len(names)}" if names else "check nvidia-smi",
            )
        each = min(threads or cores, max(1, cores // jobs))
        return [Share(each, {"CUDA_VISIBLE_DEVICES": name}) for name in names[:jobs]]
    each = threads or cores // jobs
    if each < 1 or each * jobs > cores:
        raise UsageError(
            f"{jobs} cells at a time with {max(each, 1)} threads each are more than the {cores} cores here",
            f"use at most {cores // max(each, 1)} jobs, or fewer --threads",
        )
    return [Share(each, {}) for _ in range(jobs)]


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
def pool(jobs: int, backend: str, threads: int | None, bin_dir: Path | None) -> Iterator[str]:
    """Run a scheduler and `jobs` workers; yields the scheduler's address.

    Raises:
        UsageError: as `shares`.
        EnvironmentProblem: the scheduler does not start.
    """
    parts = shares(jobs, backend, threads)
    with tempfile.TemporaryDirectory(prefix="turbo-eval-pool-") as name:
        folder = Path(name)
        with scheduler(folder) as (address, _):
            processes: list[subprocess.Popen[bytes]] = []
            try:
                for number, part in enumerate(parts):
                    command = [sys.executable, "-m", "turbo_eval", "worker", address, "--backend", backend]
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
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


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
