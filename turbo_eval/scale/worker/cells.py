"""A Dask worker that measures cells: one device, one cell at a time, nothing but `entry.call`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from turbo_eval.errors import EnvironmentProblem, TurboEvalError, UsageError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.inputs.corpora import resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.backends import backend as find_backend
from turbo_eval.llama.backends import first_here
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import collect, machine
from turbo_eval.metrics import metric
from turbo_eval.metrics.base import Bench, Job, OnProgress
from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.store import Store
from turbo_eval.scale import entry, guard
from turbo_eval.scale.target import host_of
from turbo_eval.scale.wire import (
    LOG_LIMIT,
    MACHINE,
    REQUEST,
    TOPIC,
    Admit,
    Admitted,
    Measure,
    Measured,
    Put,
    Source,
    Stored,
)
from turbo_eval.scale.worker.content import Content, RefusedError
from turbo_eval.scale.worker.tree import matching_build
from turbo_eval.util.process import relevant_environment

# A cell whose sweep is gone goes on for this long: the sweep, started again, may still want it.
ORPHAN_SECONDS = 60.0
_PROGRESS_SECONDS = 1.0
# One thread measures (a cell takes the whole device, which is a resource of 1), the other answers
# who asks to be let in and takes in files meanwhile.
THREADS = 2
_ANSWERS = 8

Say = Callable[[dict[str, Any]], None]


class AbandonedError(Exception):
    """Nobody waits for this cell any more."""


@dataclass(frozen=True)
class Device:
    """What a worker has to give. `memory_gib` is the GPU's, or the machine's for the CPU."""

    backend: str
    machine: str
    memory_gib: float

    def resources(self) -> dict[str, float]:
        """As Dask schedules by them: a cell takes the device; the machine's id is a label."""
        return {
            self.backend: 1,
            f"{MACHINE}{self.machine}": 1,
            "memory_gib": self.memory_gib,
            "gpus": int(find_backend(self.backend).gpu),
            **{f"feature:{name}": 1 for name in machine().features},
        }


def find_device(backend: str | None) -> Device:
    """The one device of this process.

    Raises:
        UsageError: there are several GPUs, or none.
    """
    here, name = machine(), backend or first_here()
    return Device(name, here.id, find_backend(name).memory_gib(here.memory_gib))


def _check_names(cell: Cell) -> None:
    """K and V become parts of file names here: types that are known, or a profile's name and bits.

    Raises:
        UsageError: neither.
    """
    if cell.profile is None:
        cache_type(cell.k), cache_type(cell.v)
    elif not all(re.fullmatch(r"[\w.+-]{1,120}", name) for name in (cell.k, cell.v)):
        raise RefusedError(f"{cell.k!r} is no name of a profile")


class Cells:
    """Answers requests: `Admit`, `Measure`, `Put`.

    Args:
        device: of this worker; requests for another backend are refused.
        bin_dir: the only build to use; None: the checkout's.
        folders: see Content.
        threads: most CPU threads a cell may use.
    """

    def __init__(
        self,
        device: Device,
        *,
        bin_dir: Path | None = None,
        folders: Sequence[Path] = (),
        threads: int | None = None,
    ) -> None:
        self.device = device
        self.address: Callable[[], str] = lambda: ""  # the Dask worker's, once it has one
        self.say: Say = lambda _: None
        self.wanted: Callable[[str], bool] = lambda _: True
        self._bin_dir = bin_dir
        self._content = Content(folders)
        self._threads = threads or machine().cores
        self._builds: dict[Source, tuple[Build, Provenance]] = {}
        self._device = threading.RLock()  # whoever measures or builds holds it
        self._answers: dict[str, Measured] = {}  # the last good ones, by ticket
        self._scratch = tempfile.TemporaryDirectory(prefix="turbo-eval-worker-")

    def __call__(self, request: str, body: bytes) -> str:
        """Never raises what the other side could not read."""
        try:
            asked = REQUEST.validate_json(request)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            answer = Admitted(
                refused=f"it does not understand the sweep ({where}: {first['msg']}); use the same turbo-eval"
            )
            return answer.model_dump_json()
        try:
            if isinstance(asked, Admit):
                return self._admit(asked).model_dump_json()
            if isinstance(asked, Put):
                size = self._content.receive(asked.need, asked.offset, body)
                return Stored(worker=self.address(), size=size).model_dump_json()
            return self._take_up(asked).model_dump_json()
        except TurboEvalError as error:
            words = error.sentence()
        except OSError as error:
            words = f"{error.filename or 'its disk'} cannot be used ({error.strerror})."
        except AbandonedError:
            words = "the sweep went away."
        except Exception as error:
            traceback.print_exc()
            words = f"it failed unexpectedly ({type(error).__name__}: {error})."
        words = words.rstrip(".")
        if isinstance(asked, Admit):
            return Admitted(refused=words).model_dump_json()
        if isinstance(asked, Put):
            return Stored(worker=self.address(), size=0, refused=words).model_dump_json()
        return Measured(worker=self.address(), refused=words).model_dump_json()

    def _admit(self, asked: Admit) -> Admitted:
        self._require_environment(asked.env)
        for need in asked.needs:
            self._content.check(need)
        return Admitted(provenance=self._build(asked.source)[1])

    def _require_environment(self, env: dict[str, str]) -> None:
        """Variables that change results are this process's own: a sweep cannot set them from afar,
        because some of them name libraries to load."""
        own = relevant_environment()
        for name in sorted(own.keys() | env.keys()):
            if own.get(name) != env.get(name):
                raise RefusedError(
                    f"{name} is {own.get(name, 'not set')} there and {env.get(name, 'not set')} in the sweep",
                    "start both with the same GGML_* and LLAMA_* variables",
                )

    def _build(self, source: Source) -> tuple[Build, Provenance]:
        if source.backend != self.device.backend:
            raise RefusedError(f"it is for {self.device.backend}, not for {source.backend}")
        if source not in self._builds:
            build = replace(matching_build(source, self._bin_dir, self._device), backend=source.backend)
            self._builds[source] = build, collect(build)
        return self._builds[source]

    def _take_up(self, asked: Measure) -> Measured:
        """Measure, or give what was measured for the same request of a sweep that was cut off. (A
        good answer that arrived is on record there, and never asked for again.)"""
        with self._device:
            known = self._answers.get(asked.ticket)
            if known is not None:
                return known
            answer = self._measure(asked)
            if answer.record is not None and answer.record.ok:
                self._answers[asked.ticket] = answer
                while len(self._answers) > _ANSWERS:
                    del self._answers[next(iter(self._answers))]
            return answer

    def _measure(self, asked: Measure) -> Measured:
        for cell in (asked.cell, *(record.cell for record in asked.references)):
            _check_names(cell)
        self._require_environment(asked.cell.env)
        build, provenance = self._build(asked.source)
        if asked.cell.tree != build.tree:
            raise RefusedError(f"the cell is of tree {asked.cell.tree[:12]}, the sweep of {build.tree[:12]}")
        found = {need: self._content.locate(need) for need in asked.needs}
        lacking = tuple(need for need, path in found.items() if path is None)
        if lacking:
            return Measured(worker=self.address(), lacking=lacking)
        files = {str(need.kind): path for need, path in found.items() if path is not None}
        job = self._job(asked, files)
        self.say({"ticket": asked.ticket, "event": "begin", "worker": self.address()})
        store = Store(Path(self._scratch.name), self.device.machine)
        try:
            threads = min(asked.threads or self._threads, self._threads)
            bench = Bench(build, provenance, store, threads, asked.timeout)
            measure = metric(job.cell.metric).measure
            record = measure(job, bench, self._follow(asked.ticket), asked.references)
            log = store.log_path(job.cell).read_text(encoding="utf-8", errors="replace")
            return Measured(worker=self.address(), record=record, log=log[-LOG_LIMIT:])
        finally:
            for file in [*store.dir.glob("*.json"), *store.dir.glob("logs/*")]:
                file.unlink(missing_ok=True)

    def _job(self, asked: Measure, files: dict[str, Path]) -> Job:
        """The cell with this machine's files, hashed once more (or remembered as unchanged)."""
        cell = asked.cell
        model, corpus = resolve_model(str(files["model"])), resolve_corpus(str(files["corpus"]))
        if (model.sha256, corpus.sha256) != (cell.model_sha256, cell.corpus_sha256):
            raise RefusedError("a file changed while it was looked up", "run the sweep again")
        anchor = str(files["anchor"]) if asked.anchor == "file" else asked.anchor
        return Job(
            cell,
            replace(model, name=cell.model),
            replace(corpus, name=cell.corpus),
            anchor,
            profile=files.get("profile"),
        )

    def _follow(self, ticket: str) -> OnProgress:
        said = 0.0
        missed: float | None = None

        def follow(chunk: int, total: int | None, ppl: float | None) -> None:
            nonlocal said, missed
            now = time.monotonic()
            if self.wanted(ticket):
                missed = None
            elif missed is None:
                missed = now
            elif now - missed > ORPHAN_SECONDS:
                raise AbandonedError
            if now - said >= _PROGRESS_SECONDS:
                said = now
                shown = {"chunk": chunk, "total": total, "ppl": ppl if ppl is None else float(ppl)}
                self.say({"ticket": ticket, "event": "progress", **shown})

        return follow


def attach(worker: Any, cells: Cells) -> None:
    """Make a Dask worker that has not registered yet one of ours.

    Raises:
        UsageError: it has another number of threads.
    """
    if worker.state.nthreads != THREADS:
        raise UsageError(
            f"the Dask worker has {worker.state.nthreads} threads, and one that measures has {THREADS}",
            f"start it with --nthreads {THREADS}",
        )
    guard.protect(worker)
    for name, amount in cells.device.resources().items():
        worker.state.total_resources[name] = amount
        worker.state.available_resources[name] = amount

    def say(message: dict[str, Any]) -> None:
        worker.log_event(TOPIC, message)

    def wanted(ticket: str) -> bool:
        task = worker.state.tasks.get(ticket)
        return task is not None and task.state == "executing"

    cells.say, cells.wanted = say, wanted
    cells.address = lambda: str(worker.contact_address or worker.address)
    entry.install(cells)


async def serve(
    address: str, cells: Cells, *, security: Any = None, name: str | None = None, patience: float = 60.0
) -> str:
    """Work for the scheduler at `address` until it goes away or a signal says to stop.

    Args:
        patience: seconds to look for a scheduler before giving up.

    Returns:
        Why it ended, for people.

    Raises:
        EnvironmentProblem: no scheduler answers.
    """
    from distributed import Worker  # noqa: PLC0415 an extra that local sweeps do without

    folder = tempfile.TemporaryDirectory(prefix="turbo-eval-dask-")
    worker = Worker(
        address,
        nthreads=THREADS,
        name=name,
        memory_limit=0,  # llama.cpp's memory is not Dask's to watch
        local_directory=folder.name,
        death_timeout=patience,
        security=security,
        # A worker beside its scheduler need not be reachable from elsewhere.
        host=_own_host(address),
    )
    attach(worker, cells)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await worker
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"no scheduler answers at {address} ({type(error).__name__}: {str(error)[:200] or 'no answer'})",
            "check the address and, with tls://, the certificates",
        ) from None
    guard.close_pages(worker)
    print(
        f"turbo-eval worker {worker.address}: {cells.device.backend} on {cells.device.machine},"
        f" {cells.device.memory_gib:g} GiB, scheduler {address}",
        file=sys.stderr,
        flush=True,
    )
    stopped = asyncio.ensure_future(stop.wait())
    finished = asyncio.ensure_future(worker.finished())
    await asyncio.wait({stopped, finished}, return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        return "the scheduler went away"
    end_children()  # a cell that runs is given back
    await worker.close(timeout=5, executor_wait=False, reason="turbo-eval worker was told to stop")
    return "told to stop"


def _own_host(address: str) -> str | None:
    """Loopback if the scheduler is there, else what Dask finds to be this machine's address."""
    host = host_of(address)
    return host if host.startswith("127.") or host == "::1" else None


def end_children() -> None:
    """Kill what this process started."""
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue
