"""Spreading real cells: llama-perplexity, SmolLM2, workers with folders and caches of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.harness import QUICK, Cli, faulty, one_sentence
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.scale.client.cluster import Cluster
from turbo_eval.scale.client.pool import PRELOAD, SCHEDULER, scheduler, started

trustme = pytest.importorskip("trustme")

FOUR = "f16:f16,q8_0:q8_0,q5_1:q5_1,q4_0:q4_0"
EIGHT = f"{FOUR},q5_0:q5_0,q4_1:q4_1,iq4_nl:iq4_nl,q8_0:q4_0"


class Lab:
    """A scheduler, and real workers in working folders of their own with empty caches."""

    def __init__(self, stack: ExitStack, folder: Path, bin_dir: Path) -> None:
        self.stack, self.folder, self.bin_dir = stack, folder, bin_dir
        self.address, self.scheduler = stack.enter_context(scheduler(folder))
        self.workers: list[subprocess.Popen[bytes]] = []

    def home(self, number: int) -> Path:
        home = self.folder / f"worker-{number}"
        home.mkdir(exist_ok=True)
        return home

    def worker(self, *options: str | Path, bin_dir: Path | None = None) -> Path:
        """Start one; returns its folder."""
        number = len(self.workers)
        home = self.home(number)
        command = [sys.executable, "-m", "turbo_eval", "worker", self.address, "--backend", "cpu"]
        command += ["--threads", "1", "--bin-dir", str(bin_dir or self.bin_dir), *map(str, options)]
        env = {"TURBO_EVAL_CACHE": str(home / "cache"), "PIP_NO_INDEX": "1"}
        process = self.stack.enter_context(started(command, home / "log", env, cwd=home))
        self.workers.append(process)
        return home

    def wait(self) -> None:
        with Cluster(self.address) as cluster:
            until = time.monotonic() + 60
            while len(cluster.members()) < len(self.workers):
                assert time.monotonic() < until, [w.poll() for w in self.workers]
                time.sleep(0.1)


@pytest.fixture
def lab(tmp_path: Path, build: Build) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(stack, tmp_path, build.bin_dir)


@pytest.fixture
def own_model(tmp_path: Path, smollm: ModelFile) -> Path:
    """SmolLM2 as no registry knows it: only the sweep can give it to a worker."""
    path = tmp_path / "mine.gguf"
    shutil.copy(smollm.path, path)
    with path.open("ab") as file:
        file.write(b"\0" * 32)
    return path


@pytest.fixture
def own_text(tmp_path: Path, prose: CorpusFile) -> Path:
    path = tmp_path / "mine.txt"
    path.write_bytes(prose.path.read_bytes()[:200_000])
    return path


# what workers measure with: a cell at a time
OLD = ("--engine", "llama-perplexity")


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that scripts read, but when and how fast."""
    return [{k: v for k, v in row.items() if k not in ("started", "seconds")} for row in rows]


def test_two_workers_give_the_table_of_one(
    lab: Lab, tmp_path: Path, build: Build, own_model: Path, own_text: Path
) -> None:
    homes = [lab.worker(), lab.worker()]
    lab.wait()
    files = ("--model", own_model, "--corpus", own_text)
    args = (*files, "--pairs", FOUR, "--ctx", "256", "--chunks", "1", "--metrics", "kld", "--json", *OLD)
    here, there = (Cli(tmp_path / name, build.bin_dir) for name in ("here", "there"))
    local = here.sweep(*args)
    spread = there.sweep(*args, "--scheduler", lab.address)
    assert (local.returncode, spread.returncode) == (0, 0), spread.stderr
    assert numbers(json.loads(spread.stdout)) == numbers(json.loads(local.stdout))
    assert spread.stderr.count("sending model mine") == 2
    for home in homes:
        kept = {p.suffix: p.stat().st_size for p in (home / "cache" / "content").iterdir()}
        assert kept[".gguf"] == own_model.stat().st_size and kept[".txt"] == own_text.stat().st_size
        assert list((home / "cache" / "logits").glob("*.dat")), "the base was not computed where cells ran"
        assert not list(home.rglob("*.json.tmp")) and not (home / "results").exists()
    logs = list(there.results.rglob("*.log"))
    assert len(logs) >= 4 and all("llama" in log.read_text() for log in logs)

    again = there.sweep(*args, "--scheduler", lab.address)
    assert again.stdout == spread.stdout and again.stderr.count("(on record)") == 4


def test_cells_get_the_records_that_they_are_judged_by(
    lab: Lab, tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile
) -> None:
    """A decode cell on one worker is compared with the batched run, wherever that was."""
    lab.worker("--models", smollm.path.parent, "--models", prose.path.parent)
    lab.wait()
    config = tmp_path / "decode.toml"
    config.write_text(
        "decode = { chunks = 1, bound_pct = 6 }\n"
        f"greedy = {{ prompts = 1, prompt_tokens = 16, tokens = 4 }}\nmodel = {str(smollm.name)!r}\n"
    )
    args = (config, "--pairs", "f16:f16,q4_0:q4_0", "--metrics", "ppl,decode,greedy", "--ctx", "96")
    here, there = (Cli(tmp_path / name, build.bin_dir) for name in ("here", "there"))
    local = here.sweep(*args, "--chunks", "1", "--json", *OLD)
    spread = there.sweep(*args, "--chunks", "1", "--json", "--scheduler", lab.address)
    assert local.returncode == 0, local.stderr
    assert numbers(json.loads(spread.stdout)) == numbers(json.loads(local.stdout)), spread.stderr
    assert "sending" not in spread.stderr, "the folders named hold everything"


def test_jobs_split_this_machine(tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile) -> None:
    one, two = (Cli(tmp_path / name, build.bin_dir) for name in ("one", "two"))
    args = ("--pairs", "f16:f16,q8_0:q8_0,q4_0:q4_0", *QUICK, "--json")
    local, spread = one.sweep(*args, *OLD), two.sweep(*args, "--jobs", "2")
    assert spread.returncode == 0, spread.stderr
    assert numbers(json.loads(spread.stdout)) == numbers(json.loads(local.stdout))
    assert not [p for p in psutil.process_iter() if _is_worker_of(p, two.results)]


def _is_worker_of(process: psutil.Process, results: Path) -> bool:
    try:
        return str(results) in " ".join(process.cmdline()) and process.pid != os.getpid()
    except psutil.Error:
        return False


def test_another_tree_or_another_file_of_that_name_is_refused_with_a_sentence(
    lab: Lab, tmp_path: Path, build: Build, own_model: Path, own_text: Path
) -> None:
    lab.worker(bin_dir=faulty(tmp_path / "other", build.bin_dir, ""))  # another build
    impostor = lab.home(1) / "cache" / "models" / "mine.gguf"
    impostor.parent.mkdir(parents=True)
    impostor.write_bytes(b"another model")
    lab.worker()
    lab.wait()
    args = ("--model", own_model, "--corpus", own_text, "--pairs", "f16:f16", *QUICK)
    cli = Cli(tmp_path / "results", build.bin_dir)
    done = cli.sweep(*args, "--scheduler", lab.address, "--patience", "1")
    assert done.returncode == 3
    lines = [line for line in done.stderr.splitlines() if "is refused" in line]
    trees = [x for x in lines if f"its build in {tmp_path / 'other'} is of tree" in x]
    names = [x for x in lines if "its mine.gguf is not the model mine of this sweep" in x]
    assert trees and names and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("turbo-eval: no worker can take the 1 cells")
    assert cli.records() == []

    lab.worker()  # one that fits is enough
    done = cli.sweep(*args, "--scheduler", lab.address)
    assert done.returncode == 0, done.stderr
    assert [r["status"] for r in cli.records()] == ["ok"]


def test_a_worker_does_not_take_variables_from_afar(
    lab: Lab, tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile
) -> None:
    lab.worker()
    lab.wait()
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ("--pairs", "f16:f16", *QUICK, "--scheduler", lab.address, "--patience", "1")
    done = cli.sweep(*args, env={"GGML_BACKEND_PATH": "/tmp/evil.so"})
    assert done.returncode == 3
    assert "GGML_BACKEND_PATH is not set there and /tmp/evil.so in the sweep" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--scheduler", "tcp://10.0.0.1:8786"), 2, "--insecure"),
        (("--scheduler", "tls://10.0.0.1:8786"), 2, "--tls-ca"),
        (("--scheduler", "/nowhere/s.json"), 2, "/nowhere/s.json"),
        (("--scheduler", "everywhere"), 2, "'everywhere'"),
        (("--jobs", "2", "--scheduler", "local"), 2, "--jobs"),
        (("--jobs", "4096"), 2, "4096"),
        (("--scheduler", "tcp://127.0.0.1:9"), 4, "tcp://127.0.0.1:9"),
    ],
)
def test_bad_schedulers_get_one_sentence(
    tmp_path: Path,
    build: Build,
    smollm: ModelFile,
    prose: CorpusFile,
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    done = Cli(tmp_path / "results", build.bin_dir).sweep("--pairs", "f16:f16", *QUICK, *options)
    assert done.returncode == code, done.stderr
    assert one_sentence(done.stderr) and words in done.stderr, done.stderr
    assert not list((tmp_path / "results").rglob("*.json"))


# -- eight cells of 512 tokens, and everything that goes wrong -------------------------------------------

CELLS = ("--pairs", EIGHT, "--ctx", "512", "--chunks", "1", "--json")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, build: Build, smollm: ModelFile, prose: CorpusFile
) -> list[dict[str, Any]]:
    """The eight cells on this machine alone."""
    done = Cli(tmp_path_factory.mktemp("undisturbed"), build.bin_dir).sweep(*CELLS, *OLD)
    assert done.returncode == 0, done.stderr
    return numbers(json.loads(done.stdout))


def _background(cli: Cli, *args: str | Path) -> subprocess.Popen[str]:
    command = cli.command(*cli.sweep_args(*args))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli.env(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _until(what: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.02)


def _computes(process: subprocess.Popen[bytes]) -> bool:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return any("llama-perplexity" in child.name() for child in children)
    except psutil.Error:
        return False


@pytest.mark.slow
def test_kill_9_of_a_worker_costs_one_retry_and_nothing_else(
    lab: Lab, tmp_path: Path, build: Build, undisturbed: list[dict[str, Any]]
) -> None:
    homes = [lab.worker(), lab.worker()]
    for home in homes:  # what must be sent is sent before the clock runs
        (home / "cache").mkdir(exist_ok=True)
    lab.wait()
    cli = Cli(tmp_path / "results", build.bin_dir)
    process = _background(cli, *CELLS, "--scheduler", lab.address)
    _until(lambda: len(cli.records()) >= 2 and _computes(lab.workers[0]))
    children = psutil.Process(lab.workers[0].pid).children(recursive=True)
    lab.workers[0].send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert numbers(json.loads(out)) == undisturbed
    begun = [line for line in err.splitlines() if line.endswith(" …")]
    assert len(begun) == 9, begun
    assert err.count(" is gone") == 1 and err.count(" runs again: ") == 1
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "the dead worker's llama-perplexity goes on"


@pytest.mark.slow
def test_a_killed_client_repeats_no_finished_cell(
    lab: Lab, tmp_path: Path, build: Build, undisturbed: list[dict[str, Any]]
) -> None:
    lab.worker(), lab.worker()
    lab.wait()
    cli = Cli(tmp_path / "results", build.bin_dir)
    process = _background(cli, *CELLS, "--scheduler", lab.address)
    _until(lambda: len(cli.records()) >= 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in cli.results.rglob("*.json")}
    assert 3 <= len(before) < 8
    done = cli.sweep(*CELLS, "--scheduler", lab.address)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(on record)") == len(before)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert numbers(json.loads(done.stdout)) == undisturbed
    assert not list(cli.results.rglob("*.tmp"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_frees_the_worker(
    lab: Lab, tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile
) -> None:
    lab.worker()
    lab.wait()
    cli = Cli(tmp_path / "results", build.bin_dir)
    process = _background(
        cli, "--pairs", "f16:f16", "--ctx", "64", "--chunks", "1000", "--scheduler", lab.address
    )
    _until(lambda: _computes(lab.workers[0]))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_sentence(err) and "run the same command again" in err
    assert _computes(lab.workers[0]), "a rerun could take it up"
    _until(lambda: not _computes(lab.workers[0]), 90)  # but nobody came


@contextmanager
def network_namespaces(count: int) -> Iterator[list[tuple[str, str, str]]]:
    """Namespaces joined to this one by a cable each: (name, our end's address, its end's address)."""
    made: list[tuple[str, str, str]] = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for number in range(count):
            name = f"te{os.getpid() % 10000}n{number}"
            ours, theirs = f"10.231.{number}.1", f"10.231.{number}.2"
            ip("netns", "add", name)
            made.append((name, ours, theirs))
            ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
            ip("link", "set", f"{name}b", "netns", name)
            ip("addr", "add", f"{ours}/30", "dev", f"{name}a")
            ip("link", "set", f"{name}a", "up")
            ip("-n", name, "addr", "add", f"{theirs}/30", "dev", f"{name}b")
            ip("-n", name, "link", "set", f"{name}b", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name, _, _ in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True)


def _can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with network_namespaces(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.slow
def test_over_a_network_with_tls_and_a_cable_pulled(
    tmp_path: Path, build: Build, own_model: Path, prose: CorpusFile, undisturbed: list[dict[str, Any]]
) -> None:
    """Scheduler and client here, each worker in a network of its own; one loses it in mid-cell."""
    if not _can_make_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    ca = trustme.CA()
    issued = ca.issue_cert("turbo-eval")
    pem = {part: tmp_path / f"{part}.pem" for part in ("ca", "cert", "key")}
    ca.cert_pem.write_to_path(pem["ca"])
    issued.cert_chain_pems[0].write_to_path(pem["cert"])
    issued.private_key_pem.write_to_path(pem["key"])
    tls = [word for part, path in pem.items() for word in (f"--tls-{part}", str(path))]
    with ExitStack() as stack:
        networks = stack.enter_context(network_namespaces(2))
        command = [*SCHEDULER, "--host", "tls://0.0.0.0:0", "--scheduler-file", str(tmp_path / "s.json")]
        command += ["--protocol", "tls", "--tls-ca-file", str(pem["ca"]), *tls[2:], *PRELOAD]
        stack.enter_context(started(command, tmp_path / "scheduler.log", {}))
        _until((tmp_path / "s.json").exists)
        port = json.loads((tmp_path / "s.json").read_text())["address"].rsplit(":", 1)[1]
        workers = []
        for number, (name, address, _) in enumerate(networks):
            home = tmp_path / f"home-{number}"
            home.mkdir()
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "turbo_eval", "worker"]
            command += [f"tls://{address}:{port}", "--backend", "cpu", "--threads", "1", *tls]
            command += ["--bin-dir", str(build.bin_dir)]
            env = {"TURBO_EVAL_CACHE": str(home / "cache")}
            workers.append(stack.enter_context(started(command, home / "log", env, cwd=home)))
        address = f"tls://{networks[0][1]}:{port}"
        cli = Cli(tmp_path / "results", build.bin_dir)
        process = _background(cli, "--model", own_model, *CELLS, "--scheduler", address, *tls)
        _until(lambda: len(cli.records()) >= 3 and _computes(workers[1]), 300)
        name = networks[1][0]
        subprocess.run(["ip", "link", "set", f"{name}a", "down"], check=True)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        rows = numbers(json.loads(out))
        names = ("model", "model_sha256", "key")
        kept = [{k: v for k, v in row.items() if k not in names} for row in rows]
        assert kept == [{k: v for k, v in row.items() if k not in names} for row in undisturbed]
        assert err.count("sending model mine") == 2, "both got the model through TLS"
        assert err.count(" is gone") == 1 and err.count(" runs again: ") == 1
