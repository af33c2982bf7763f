"""Spreading cells over a real scheduler and real workers, with a measurement that only sleeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from turbo_eval.errors import EnvironmentProblem, IncompleteError
from turbo_eval.llama.provenance import machine
from turbo_eval.records.record import Record
from turbo_eval.records.store import read_all
from turbo_eval.scale import overhead
from turbo_eval.scale.client.cluster import Cluster
from turbo_eval.scale.client.executor import Patience, run_on_cluster
from turbo_eval.scale.client.pool import PRELOAD, SCHEDULER, scheduler, started
from turbo_eval.scale.overhead import simulated_plan
from turbo_eval.scale.target import TlsFiles, security
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.run import SweepResult

trustme = pytest.importorskip("trustme")


class Ear:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[tuple[int, str, bool]] = []
        self.notes: list[str] = []
        self.on_begin: Callable[[int], None] = lambda _: None

    def begin(self, number: int, job: object) -> None:
        self.begun.append(number)
        self.on_begin(number)

    def progress(
        self, number: int, chunk: int, total: int | None, ppl: float | None, base: float | None = None
    ) -> None:
        pass

    def end(self, number: int, record: Record, *, reused: bool) -> None:
        self.ended.append((number, record.status, reused))

    def waiting(self, number: int, job: object) -> None:
        self.notes.append(f"waiting for {number}")

    def note(self, text: str) -> None:
        self.notes.append(text)


class Lab:
    """A scheduler and workers for one test."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        self.results = folder / "results"
        self.address, self.scheduler = stack.enter_context(scheduler(folder))
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self, **rules: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.support.scale_worker", self.address, json.dumps(rules)]
        log = self.folder / f"worker-{len(self.workers)}.log"
        self.workers.append(self.stack.enter_context(started(command, log, {})))
        return self.workers[-1]

    def cluster(self, workers: int | None = None) -> Cluster:
        cluster = self.stack.enter_context(Cluster(self.address))
        until = time.monotonic() + 60
        while len(cluster.members()) < (len(self.workers) if workers is None else workers):
            assert time.monotonic() < until, "the workers do not come up"
            time.sleep(0.05)
        return cluster

    def sweep(self, plan: Plan, ear: Ear | None = None, *, retries: int = 2, **more: Any) -> SweepResult:
        with self.cluster() as cluster:
            return run_on_cluster(
                plan,
                overhead._provenance(),
                self.results,
                ear or Ear(),
                cluster,
                patience=Patience(more.pop("patience", 30.0), retries),
                **more,
            )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(stack, tmp_path)


def test_every_cell_is_run_once_and_its_log_comes_home(lab: Lab) -> None:
    lab.worker(seconds=0.02)
    lab.worker(seconds=0.02)
    ear, plan = Ear(), simulated_plan(30)
    result = lab.sweep(plan, ear)
    assert [r.cell for r in result.records] == plan.cells()
    assert sorted(ear.begun) == list(range(30)) and ear.notes == []
    assert len(read_all([lab.results])) == 30
    logs = {p.read_text() for p in lab.results.rglob("*.log")}
    assert logs == {f"log of {n}\n" for n in range(30)}
    assert not list(lab.results.rglob("*.tmp"))


def test_kill_9_of_a_worker_costs_one_retry(lab: Lab) -> None:
    trail = lab.folder / "trail"
    for _ in range(2):
        lab.worker(seconds=0.3, trail=str(trail))
    ear, plan = Ear(), simulated_plan(10)

    def kill(number: int) -> None:
        if len(ear.begun) == 6:  # both are at work
            lab.workers[0].send_signal(signal.SIGKILL)

    ear.on_begin = kill
    result = lab.sweep(plan, ear)
    assert len(result.records) == 10 and [n for n, _, _ in sorted(ear.ended)] == list(range(10))
    assert len(trail.read_text().split()) == 11, "ten cells, one of them twice"
    assert len([n for n in ear.notes if n.startswith("worker")]) == 1, ear.notes


def test_a_cell_that_kills_every_worker_ends_with_a_status(lab: Lab) -> None:
    for _ in range(4):
        lab.worker(seconds=0.02, die=[2])
    ear = Ear()
    result = lab.sweep(simulated_plan(6), ear, retries=2)
    status = [r.status for r in result.records]
    assert status == ["no-result", "no-result", "crash", *["no-result"] * 3]
    assert "its worker was lost 3 times" in result.records[2].detail
    assert result.records[2].ppl is None
    assert sum(w.poll() is not None for w in lab.workers) == 3
    assert all(ear.begun.count(n) == 1 for n in (0, 1, 3, 4, 5)), "the others paid for it"


def test_a_timeout_is_tried_again_within_bounds(lab: Lab) -> None:
    lab.worker(seconds=0.02, timeout={"1": 1, "3": 9})
    ear = Ear()
    result = lab.sweep(simulated_plan(5), ear, retries=2)
    assert [r.status for r in result.records] == [
        "no-result",
        "no-result",
        "no-result",
        "timeout",
        "no-result",
    ]
    assert [ear.begun.count(n) for n in range(5)] == [1, 2, 1, 3, 1]


def test_a_stopped_worker_gives_its_cell_back(lab: Lab) -> None:
    """SIGTERM, as SLURM sends before it takes a node away."""
    lab.worker(hang=[0], seconds=0.02)
    ear = Ear()

    def stop(number: int) -> None:
        if number == 0 and len(ear.begun) == 1:
            lab.workers[0].terminate()
            lab.worker(seconds=0.02)

    ear.on_begin = stop
    result = lab.sweep(simulated_plan(3), ear)
    assert [r.status for r in result.records] == ["no-result"] * 3
    assert lab.workers[0].wait(20) == 0
    assert ear.begun.count(0) == 2


def test_a_worker_in_trouble_is_refused_and_the_cell_goes_elsewhere(lab: Lab) -> None:
    lab.worker(seconds=0.02, trouble=[1])
    ear = Ear()

    def help_comes(number: int) -> None:
        if len(lab.workers) == 1:
            lab.worker(seconds=0.02)

    ear.on_begin = help_comes
    result = lab.sweep(simulated_plan(4), ear)
    assert [r.status for r in result.records] == ["no-result"] * 4
    assert [n for n in ear.notes if "is refused: its disk is on fire" in n]


def test_when_nobody_can_the_sweep_says_why(lab: Lab) -> None:
    lab.worker(seconds=0.02, tree="another")
    began = time.monotonic()
    with pytest.raises(IncompleteError) as caught:
        lab.sweep(simulated_plan(2), patience=2.0)
    assert time.monotonic() - began < 30
    assert "no worker can take the 2 cells" in caught.value.message
    assert "is refused" in caught.value.message and "tree" in caught.value.message


def test_a_record_of_another_cell_is_not_believed(lab: Lab) -> None:
    lab.worker(seconds=0.02, lie=[1])
    ear = Ear()
    with pytest.raises(IncompleteError, match="another cell"):
        lab.sweep(simulated_plan(3), ear, patience=2.0)
    assert {r.cell.options["number"] for r in read_all([lab.results])} == {0, 2} - {
        n for n in range(3) if n not in [e[0] for e in ear.ended]
    }


def test_one_comparison_is_never_spread_over_two_kinds_of_machine(lab: Lab) -> None:
    lab.worker(seconds=0.05, machine="kind-a", ok=True)
    lab.worker(seconds=0.05, machine="kind-b", ok=True)
    result = lab.sweep(simulated_plan(12))
    assert len({r.machine for r in result.records}) == 1
    # on record for one kind, the sweep goes on there even where the other could take it, too
    (first,) = {r.machine for r in result.records}
    more = lab.sweep(simulated_plan(16))
    assert {r.machine for r in more.records} == {first}
    assert more.reused == 12


def test_a_comparison_begun_on_a_kind_that_is_gone_is_measured_anew_and_said_so(lab: Lab) -> None:
    first = lab.worker(seconds=0.02, machine="kind-a", ok=True)
    lab.sweep(simulated_plan(4))
    first.terminate()
    first.wait()
    lab.workers.clear()
    lab.worker(seconds=0.02, machine="kind-b", ok=True)
    ear = Ear()
    result = lab.sweep(simulated_plan(6), ear)
    assert {r.machine for r in result.records} == {"kind-b"} and result.reused == 0
    assert len([n for n in ear.notes if "is on record for kind-a" in n]) == 1
    whole = lab.sweep(simulated_plan(4))
    assert whole.reused == 4


def test_two_sweeps_on_one_folder_share_the_work(lab: Lab) -> None:
    lab.worker(seconds=0.1, ok=True)
    lab.worker(seconds=0.1, ok=True)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.integration.test_scale_cluster import Ear, child_sweep\n"
        "child_sweep(sys.argv[1], Path(sys.argv[2]), 20)\n"
    )
    command = [sys.executable, "-c", code, lab.address, str(lab.results)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [json.loads(p.communicate(timeout=120)[0]) for p in both]
    assert sum(out["ran"] for out in outs) == 20, outs
    assert all(out["records"] == 20 for out in outs)


def child_sweep(address: str, results: Path, cells: int) -> None:
    """A sweep in a process of its own."""
    ear = Ear()
    with Cluster(address) as cluster:
        result = run_on_cluster(simulated_plan(cells), overhead._provenance(), results, ear, cluster)
    ran = sum(not reused for _, _, reused in ear.ended)
    print(json.dumps({"ran": ran, "records": len(result.records), "begun": ear.begun}), flush=True)


def test_a_rerun_after_the_client_was_killed_takes_up_the_cell_that_runs(lab: Lab) -> None:
    trail = lab.folder / "trail"
    lab.worker(seconds=3, trail=str(trail), ok=True)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.integration.test_scale_cluster import child_sweep\n"
        "child_sweep(sys.argv[1], Path(sys.argv[2]), 1)\n"
    )
    command = [sys.executable, "-c", code, lab.address, str(lab.results)]
    first = subprocess.Popen(command)
    until = time.monotonic() + 30
    while not trail.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(0.5)  # the scheduler sees that the client is gone
    assert len(lab.sweep(simulated_plan(1)).records) == 1
    assert trail.read_text().split() == ["0"], "it was measured again although it was running"


def test_a_scheduler_that_dies_ends_the_sweep_with_a_sentence(lab: Lab) -> None:
    lab.worker(seconds=0.3)
    ear = Ear()
    ear.on_begin = lambda n: lab.scheduler.kill() if n == 2 else None
    with pytest.raises(EnvironmentProblem, match="was lost") as caught:
        lab.sweep(simulated_plan(20), ear)
    assert "run the same command again" in caught.value.next_step
    assert len(read_all([lab.results])) >= 1


# -- who may do what -----------------------------------------------------------------------------------


def test_workers_and_scheduler_run_nothing_but_cells(lab: Lab, tmp_path: Path) -> None:
    from distributed import Client

    lab.worker(seconds=0.02)
    lab.cluster().close()
    script = tmp_path / "evil.py"
    mark = tmp_path / "mark"
    script.write_text(f"open({str(mark)!r}, 'w').close()\n")
    with Client(lab.address, set_as_default=False) as client:
        attacks: list[Callable[[], object]] = [
            lambda: client.submit(os.system, f"touch {mark}").result(timeout=10),
            lambda: client.submit(lambda: mark.touch()).result(timeout=10),
            lambda: client.run(os.system, f"touch {mark}"),
            lambda: client.run_on_scheduler(os.system, f"touch {mark}"),
            lambda: client.upload_file(str(script)),
            lambda: client.register_plugin(_Plugin(mark)),
        ]
        worker = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
        attacks.append(lambda: client.sync(_direct_run, client, worker, mark))
        for number, attack in enumerate(attacks):
            answer: object = None
            try:
                answer = attack()
            except Exception as error:
                answer = error
            assert not mark.exists(), f"attack {number} ran"
            assert isinstance(answer, Exception), f"attack {number} was answered: {answer!r}"
    assert len(lab.sweep(simulated_plan(3)).records) == 3, "and the cluster still works"


async def _direct_run(client: Any, worker: str, mark: Path) -> object:
    """Past the scheduler, straight to the worker's own port."""
    from distributed.protocol.serialize import to_serialize
    from distributed.utils_comm import retry_operation

    remote = client.rpc(worker)
    return await retry_operation(
        remote.run, function=to_serialize(os.system), args=to_serialize((f"touch {mark}",))
    )


class _Plugin:
    name = "evil"

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def setup(self, worker: Any) -> None:
        self.mark.touch()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TlsFiles]:
    """Certificates: `authority("ours")` and `authority("theirs")` are signed by different ones."""
    folder = tmp_path_factory.mktemp("tls")

    def make(who: str) -> TlsFiles:
        files = TlsFiles(*(folder / f"{who}-{part}.pem" for part in ("ca", "cert", "key")))
        assert files.ca and files.cert and files.key
        if not files.ca.exists():
            ca = trustme.CA()
            issued = ca.issue_cert("turbo-eval")
            ca.cert_pem.write_to_path(files.ca)
            issued.private_key_pem.write_to_path(files.key)
            issued.cert_chain_pems[0].write_to_path(files.cert)
        return files

    return make


def _tls_options(files: TlsFiles, prefix: str) -> list[str]:
    parts = (("ca-file", files.ca), ("cert", files.cert), ("key", files.key))
    return [text for part, path in parts for text in (f"--{prefix}-{part}", str(path))]


def test_tls_lets_in_who_has_a_certificate_and_nobody_else(
    tmp_path: Path, authority: Callable[[str], TlsFiles]
) -> None:
    ours, theirs = authority("ours"), authority("theirs")
    with ExitStack() as stack:
        options = [*_tls_options(ours, "tls"), "--protocol", "tls"]
        address, _ = stack.enter_context(scheduler(tmp_path, *options))
        assert address.startswith("tls://")
        command = [sys.executable, "-m", "turbo_eval", "worker", address, "--backend", "cpu"]
        command += ["--tls-ca", str(ours.ca), "--tls-cert", str(ours.cert), "--tls-key", str(ours.key)]
        log = tmp_path / "worker.log"
        stack.enter_context(started(command, log, {}))
        with Cluster(address, security(address, ours, insecure=False)) as cluster:
            until = time.monotonic() + 60
            while not cluster.members():
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            (member,) = cluster.members().values()
            assert member.address.startswith("tls://") and member.resources["cpu"] == 1
        with pytest.raises(EnvironmentProblem, match="no scheduler answers") as caught:
            Cluster(address, security(address, theirs, insecure=False), timeout=3)
        assert "certificates" in caught.value.next_step
        with pytest.raises(EnvironmentProblem, match="no scheduler answers"):
            Cluster(address.replace("tls://", "tcp://"), None, timeout=3)


def test_the_certificates_of_the_docs_work(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "scale-out.md").read_text()
    block = next(b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if b.startswith("openssl"))
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, capture_output=True)
    files = TlsFiles(tmp_path / "ca.pem", tmp_path / "me.pem", tmp_path / "me.key")
    with (
        scheduler(tmp_path, *_tls_options(files, "tls"), "--protocol", "tls") as (address, _),
        Cluster(address, security(address, files, insecure=False)) as cluster,
    ):
        assert cluster.members() == {}


def test_a_worker_without_a_scheduler_says_so() -> None:
    command = [sys.executable, "-m", "turbo_eval", "worker", "tcp://127.0.0.1:9", "--patience", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "no scheduler answers at tcp://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_ends_with_its_scheduler(lab: Lab) -> None:
    command = [sys.executable, "-m", "turbo_eval", "worker", lab.address, "--backend", "cpu"]
    process = lab.stack.enter_context(started(command, lab.folder / "w.log", {}))
    lab.cluster(1).close()
    lab.scheduler.kill()
    assert process.wait(60) == 4
    assert "the scheduler went away" in (lab.folder / "w.log").read_text()
    assert not psutil.pid_exists(process.pid)


def test_stock_dask_workers_become_ours_by_preload(lab: Lab) -> None:
    command = [sys.executable, "-m", "distributed.cli.dask_worker", lab.address, "--no-nanny", "--nthreads"]
    command += ["2", "--no-dashboard", "--preload", "turbo_eval.scale.preload"]
    env = {"TURBO_EVAL_WORKER_BACKEND": "cpu"}
    lab.stack.enter_context(started(command, lab.folder / "w.log", env))
    (member,) = lab.cluster(1).members().values()
    assert member.machine() == machine().id and member.resources["cpu"] == 1


def test_a_worker_with_many_threads_is_refused_by_preload(lab: Lab) -> None:
    command = [sys.executable, "-m", "distributed.cli.dask_worker", lab.address, "--no-nanny", "--nthreads"]
    command += ["4", "--no-dashboard", "--preload", "turbo_eval.scale.preload"]
    process = lab.stack.enter_context(started(command, lab.folder / "w.log", {}))
    assert process.wait(60) != 0
    assert "start it with --nthreads 2" in (lab.folder / "w.log").read_text()


def test_a_plain_scheduler_that_others_can_reach_must_be_wanted(tmp_path: Path) -> None:
    command = [*SCHEDULER, "--host", "0.0.0.0", "--port", "0", *PRELOAD]
    with started(command, tmp_path / "log", {}) as process:
        assert process.wait(60) == 2
    assert "is not encrypted and reachable from other machines" in (tmp_path / "log").read_text()
    file = tmp_path / "s.json"
    command += ["--scheduler-file", str(file)]
    with started(command, tmp_path / "log", {"TURBO_EVAL_INSECURE": "1"}) as process:
        until = time.monotonic() + 60
        while not file.exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)


def test_a_timer_of_dask_does_not_hide_the_workers(lab: Lab) -> None:
    """Dask's client refreshes what it knows every two seconds, and leaves the workers out."""
    lab.worker(seconds=0.02)
    cluster = lab.cluster()
    client, over = cluster._client, threading.Event()

    def refresh() -> None:
        while not over.is_set():
            client.sync(client._update_scheduler_info)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        assert all(len(cluster.members()) == 1 for _ in range(300))
    finally:
        over.set()
        thread.join()


def test_nothing_listens_but_dask_itself(lab: Lab) -> None:
    """No web pages: neither the scheduler's nor the workers'."""
    lab.worker(seconds=0.02)
    lab.cluster().close()
    for process in (lab.scheduler, *lab.workers):
        until = time.monotonic() + 5
        while len(open_ports := _listening(process.pid)) > 1 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(open_ports) == 1, open_ports
        assert open_ports[0][0] == "127.0.0.1"


def _listening(pid: int) -> list[tuple[str, int]]:
    found = psutil.Process(pid).net_connections(kind="tcp")
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]


def test_overhead_is_measured_by_a_command() -> None:
    command = [sys.executable, "-m", "turbo_eval.scale.overhead", "--cells", "20", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 cells" in done.stdout and "20 records" in done.stdout
    assert "peak memory: client" in done.stdout
