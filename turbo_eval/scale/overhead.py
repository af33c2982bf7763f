"""What spreading costs: many short cells that only sleep, through the whole way of a sweep.

    python -m turbo_eval.scale.overhead --cells 10000 --seconds 0.05 --workers 2

Scheduler and workers are processes of their own, as in a real sweep; records are written (to a folder
that is thrown away) with status "no-result": nothing is measured, so there is no number.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import psutil

from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.gguf_info import GgufInfo
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import machine
from turbo_eval.metrics.base import Job
from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record, Run
from turbo_eval.scale.client.cluster import Cluster
from turbo_eval.scale.client.executor import run_on_cluster
from turbo_eval.scale.client.pool import scheduler, started
from turbo_eval.scale.wire import Admit, Admitted, Measure, Measured
from turbo_eval.scale.worker.cells import Cells, find_device, serve
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.spec import sweep_spec
from turbo_eval.util import python

_TREE = "simulated"


class Sleeper(Cells):
    """Answers for a measurement after `seconds` of sleep."""

    seconds = 0.05

    def _admit(self, asked: Admit) -> Admitted:
        return Admitted(provenance=_provenance())

    def _measure(self, asked: Measure) -> Measured:
        self.say({"ticket": asked.ticket, "event": "begin", "worker": self.address()})
        time.sleep(self.seconds)
        run = Run(
            argv=(),
            env={},
            env_removed=(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=self.seconds,
            cpu_seconds=0.0,
            peak_mib=0.0,
            returncode=0,
            threads=0,
            log="",
        )
        record = Record(
            key=asked.cell.key(),
            cell=asked.cell,
            status="no-result",
            detail="simulated",
            run=run,
            provenance=_provenance(),
        )
        return Measured(worker=self.address(), record=record)


class Quiet:
    """A sweep that says nothing."""

    def begin(self, number: int, job: Job) -> None: ...
    def progress(
        self, number: int, chunk: int, total: int | None, ppl: float | None, base: float | None = None
    ) -> None: ...
    def end(self, number: int, record: Record, *, reused: bool) -> None: ...
    def waiting(self, number: int, job: Job) -> None: ...
    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def _provenance() -> Provenance:
    return Provenance(
        backend="cpu",
        pin="",
        series="",
        tree=_TREE,
        dirty=False,
        compiler="",
        flags=(),
        machine=machine(),
        packages={},
        harness="",
    )


def simulated_plan(cells: int) -> Plan:
    """A plan of cells that differ in a number and need no file."""
    spec = sweep_spec({"model": "none", "pairs": ["f16:f16"]}, "overhead")
    build = Build("cpu", Path(), _TREE, "", dirty=False, compiler="", flags=(), stamp="")
    shape = dict.fromkeys(
        ("n_layer", "n_embd", "n_head", "n_head_kv", "head_dim_k", "head_dim_v", "n_ctx_train", "n_vocab"), 1
    )
    info = GgufInfo(arch="none", name="none", file_type="", tensor_count=0, **shape)
    model = ModelFile("none", Path(), "0" * 64, 0, info)
    corpus = CorpusFile("none", Path(), "0" * 64, 0)
    cell = Cell(
        metric="ppl",
        model="none",
        model_sha256="0" * 64,
        corpus="none",
        corpus_sha256="0" * 64,
        k="f16",
        v="f16",
        ctx=512,
        chunks=1,
        batch=512,
        ubatch=512,
        backend="cpu",
        tree=_TREE,
    )
    jobs = (
        Job(cell.model_copy(update={"options": {"number": n}}), model, corpus, None) for n in range(cells)
    )
    return Plan(spec, build, tuple(jobs), 1)


def peak_mib(pid: int) -> float:
    """Largest resident memory of a process so far; where the system does not keep it, the memory now."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return float(line.split()[1]) / 1024
    except OSError:
        pass
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def own_peak_mib() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(cells: int, seconds: float, workers: int) -> None:
    """Run and print the figures."""
    plan = simulated_plan(cells)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turbo-eval-overhead-")))
        address, process = stack.enter_context(scheduler(folder))
        me = python.command("-m", "turbo_eval.scale.overhead", "--worker", address)
        for number in range(workers):
            log = folder / f"worker-{number}.log"
            stack.enter_context(started([*me, "--seconds", str(seconds)], log, {}))
        cluster = stack.enter_context(Cluster(address))
        while len(cluster.members()) < workers:
            time.sleep(0.1)
        begin_client, begin_scheduler = own_peak_mib(), peak_mib(process.pid)
        usage = psutil.Process()
        cpu_client, cpu_scheduler = (_cpu(p) for p in (usage, psutil.Process(process.pid)))
        began = time.monotonic()
        result = run_on_cluster(plan, _provenance(), folder / "results", Quiet(), cluster)
        spent = time.monotonic() - began
        cpu_client = _cpu(usage) - cpu_client
        cpu_scheduler = _cpu(psutil.Process(process.pid)) - cpu_scheduler
        done = len(result.records)
        files = sum(1 for _ in (folder / "results").rglob("*.json"))
        ideal = cells * seconds / workers
        print(f"{done} of {cells} cells of {1000 * seconds:g} ms on {workers} workers, {files} records")
        print(f"{spent:.1f} s, ideal {ideal:.1f} s")
        print(f"overhead {1000 * (spent - ideal) / cells:.2f} ms of wall time a cell")
        print(f"         {1000 * (spent - ideal) * workers / cells:.2f} ms of a worker's time a cell")
        print(f"processor time a cell: client {1000 * cpu_client / cells:.2f} ms,", end=" ")
        print(f"scheduler {1000 * cpu_scheduler / cells:.2f} ms")
        print(f"peak memory: client {own_peak_mib():.0f} MiB (before: {begin_client:.0f}),", end=" ")
        print(f"scheduler {peak_mib(process.pid):.0f} MiB (before: {begin_scheduler:.0f})")


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m turbo_eval.scale.overhead", description=__doc__)
    parser.add_argument("--cells", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        sleeper = Sleeper(find_device("cpu"))
        sleeper.seconds = given.seconds
        asyncio.run(serve(given.worker, sleeper))
        return
    measure(given.cells, given.seconds, given.workers)


if __name__ == "__main__":
    main()
