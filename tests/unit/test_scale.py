"""Spreading cells, the parts that need no scheduler."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import toy as toys
from tests.support.records import make_cell
from turbo_eval import scale
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama import build as builds
from turbo_eval.llama import patches
from turbo_eval.llama.provenance import machine
from turbo_eval.scale import entry, guard
from turbo_eval.scale.client.placement import Placement
from turbo_eval.scale.client.pool import shares
from turbo_eval.scale.target import Target, TlsFiles, parse_target, scheduler_address, security
from turbo_eval.scale.wire import Admit, Measure, Need, Source
from turbo_eval.scale.worker.cells import Cells, Device, find_device
from turbo_eval.scale.worker.content import Content, RefusedError
from turbo_eval.scale.worker.tree import matching_build
from turbo_eval.util.files import FileMemory, file_sha256, sha256_of

DECODE = {"batched_ubatch": 512, "batched_chunks": 4, "bound_pct": 2.0}
ANY = float("inf")


def test_local_work_imports_no_dask() -> None:
    code = (
        "import sys, turbo_eval.cli, turbo_eval.sweep.run, turbo_eval.commands.sweep\n"
        "import turbo_eval.scale.target\n"
        "sys.exit(any(m.split('.')[0] in ('dask', 'distributed') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_needs_neither_numpy_nor_gguf() -> None:
    code = "import sys, turbo_eval.cli; sys.exit(bool({'numpy', 'gguf', 'httpx2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_dask_is_said_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match="Dask") as caught:
        scale.require_distributed()
    assert "turbo-eval[scale]" in caught.value.next_step


# -- where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "jobs", "target"),
    [
        (None, None, Target("local")),
        ("local", None, Target("local")),
        (None, 1, Target("local")),
        ("local:1", None, Target("local")),
        ("local:3", None, Target("pool", 3)),
        (None, 3, Target("pool", 3)),
        ("tcp://head:8786", None, Target("remote", address="tcp://head:8786")),
        ("tls://10.0.0.1:8786", None, Target("remote", address="tls://10.0.0.1:8786")),
    ],
)
def test_jobs_and_local_n_are_one_mechanism(scheduler: str | None, jobs: int | None, target: Target) -> None:
    assert parse_target(scheduler, jobs) == target


@pytest.mark.parametrize(
    ("scheduler", "jobs", "words"),
    [
        ("local:2", 2, "say the same thing"),
        (None, 0, "--jobs 0"),
        ("local:0", None, "local:0"),
        ("head:8786", None, "tcp://host:8786"),
        ("dask://head:8786", None, "is no scheduler"),
        ("/nowhere/s.json", None, "no scheduler file"),
    ],
)
def test_bad_targets(scheduler: str | None, jobs: int | None, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(scheduler, jobs)
    assert words in caught.value.sentence()


def test_scheduler_file(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"type": "Scheduler", "address": "tls://10.1.2.3:8786"}))
    assert scheduler_address(str(file)) == "tls://10.1.2.3:8786"
    file.write_text("{}")
    with pytest.raises(UsageError, match="no scheduler file"):
        scheduler_address(str(file))


def test_plain_tcp_only_on_loopback_or_when_said() -> None:
    assert security("tcp://127.0.0.1:8786", TlsFiles(), insecure=False) is None
    assert security("tcp://10.0.0.1:8786", TlsFiles(), insecure=True) is None
    with pytest.raises(UsageError, match="not encrypted"):
        security("tcp://10.0.0.1:8786", TlsFiles(), insecure=False)
    with pytest.raises(UsageError, match="not encrypted"):
        security("tcp://127.0.0.1.example.org:8786", TlsFiles(), insecure=False)


def test_tls_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="certificates"):
        security("tls://10.0.0.1:8786", TlsFiles(), insecure=False)
    with pytest.raises(UsageError, match="no certificate"):
        security("tls://10.0.0.1:8786", TlsFiles(ca=tmp_path / "ca.pem"), insecure=False)
    with pytest.raises(UsageError, match="takes no certificates"):
        security("tcp://127.0.0.1:8786", TlsFiles(ca=tmp_path / "ca.pem"), insecure=False)
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    with pytest.raises(EnvironmentProblem, match="cannot be used"):
        security("tls://10.0.0.1:8786", TlsFiles(junk, junk, junk), insecure=False)


def test_a_cpu_is_split_and_never_oversubscribed() -> None:
    cores = machine().cores
    assert [s.threads for s in shares(2, "cpu", None)] == [cores // 2] * 2 if cores > 1 else True
    assert [s.threads for s in shares(cores, "cpu", 1)] == [1] * cores
    with pytest.raises(UsageError, match="more than the"):
        shares(2, "cpu", cores)
    with pytest.raises(UsageError, match="more than the"):
        shares(cores + 1, "cpu", None)
    with pytest.raises(UsageError, match="one Metal device"):
        shares(2, "metal", None)


def test_each_gpu_gets_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares(2, "cuda", None)] == ["3", "5"]
    with pytest.raises(UsageError, match="3 GPUs, this machine has 2"):
        shares(3, "cuda", None)


SMI = """#!/bin/bash
# two unlike GPUs, as nvidia-smi lists them; -i chooses
chosen=0,1
[ "$1" = -i ] && chosen=$2
for i in ${chosen//,/ }; do
  [ "$i" = 0 ] && echo "NVIDIA A100 80GB PCIe, 81920"
  [ "$i" = 1 ] && echo "NVIDIA L4, 23034"
done
exit 0
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with two GPUs, as far as one can tell by asking nvidia-smi."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.cache_clear()
    yield monkeypatch
    machine.cache_clear()


def test_a_worker_is_for_one_gpu_and_declares_it(two_gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="sees 2 GPUs") as caught:
        find_device(None)
    assert "CUDA_VISIBLE_DEVICES=0" in caught.value.next_step
    devices = []
    for number in "01":
        two_gpus.setenv("CUDA_VISIBLE_DEVICES", number)
        machine.cache_clear()
        devices.append(find_device(None))
    assert [d.memory_gib for d in devices] == [80.0, 22.5]
    assert devices[0].machine != devices[1].machine, "unlike GPUs of one machine are compared with none"
    resources = devices[1].resources()
    assert (resources["cuda"], resources["gpus"], resources["memory_gib"]) == (1, 1, 22.5)
    assert resources[f"machine:{devices[1].machine}"] == 1
    two_gpus.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.cache_clear()
    assert find_device(None).backend == "cpu"
    with pytest.raises(UsageError, match="sees no NVIDIA GPU"):
        find_device("cuda")


def test_jobs_give_each_gpu_to_one_worker(two_gpus: pytest.MonkeyPatch) -> None:
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in shares(2, "cuda", None)] == ["0", "1"]
    with pytest.raises(UsageError, match="use --jobs 2"):
        raise_sentence(lambda: shares(3, "cuda", None))


def raise_sentence(act: Callable[[], object]) -> None:
    """The sentence as the message, so that `match` sees the next step too."""
    try:
        act()
    except UsageError as error:
        raise UsageError(error.sentence()) from None


# -- placement -----------------------------------------------------------------------------------------


def test_a_comparison_stays_on_one_class_of_machine() -> None:
    cells = [make_cell(pair, ctx=ctx) for ctx in (512, 1024) for pair in ("f16:f16", "q8_0:q8_0")]
    placement = Placement(cells, [1.0] * 4)
    assert placement.take("a", ANY) == 0
    assert placement.take("b", ANY) == 2, "b gets the other comparison, not the rest of a's"
    assert placement.take("a", ANY) == 1
    assert placement.take("a", ANY) is None
    placement.give_back(3) if placement.take("b", ANY) == 3 else pytest.fail("b did not get its second")
    assert placement.take("a", ANY) is None, "what b gave back is b's"
    assert placement.take("b", ANY) == 3


def test_a_cell_waits_for_those_it_is_judged_by() -> None:
    kinds: list[dict[str, Any]] = [
        {"metric": "decode", "ubatch": 1, "chunks": 2, "options": DECODE},
        {"metric": "ppl"},
        {"metric": "greedy", "options": {"prompts": 1}},
    ]
    cells = [make_cell("q8_0:q8_0", **kind) for kind in kinds]
    cells.append(make_cell("f16:f16", **kinds[2]))
    placement = Placement(cells, [1.0] * 4)
    assert len(placement.groups) == 1
    assert [placement.take("a", ANY) for _ in range(3)] == [1, 3, None]
    placement.done(1)
    assert placement.take("a", ANY) == 0
    assert placement.take("a", ANY) is None
    placement.done(3)
    assert placement.take("a", ANY) == 2


def test_a_comparison_goes_where_its_largest_cell_fits() -> None:
    placement = Placement([make_cell("f16:f16"), make_cell("q8_0:q8_0")], [1.0, 30.0])
    assert placement.take("small", 24.0) is None
    assert placement.take("large", 80.0) == 0


def test_a_class_that_is_gone_keeps_only_what_it_measured() -> None:
    cells = [make_cell("f16:f16", ctx=ctx) for ctx in (512, 1024)]
    placement = Placement(cells, [1.0] * 2)
    for number in (placement.take("a", ANY), placement.take("a", ANY)):
        assert number is not None
        placement.done(number) if number == 0 else placement.give_back(number)
    placement.release("a")
    assert [group.machine for group in placement.groups.values()] == ["a", None]


# -- what is unpickled ---------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getpid, ()


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_calls_anything_of_others(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_depth", 0)  # Dask workers of earlier tests in this process keep it on
    bomb = pickle.dumps(_Bomb(), protocol=protocol)
    assert pickle.loads(bomb) == os.getpid()
    guard.turn_on()
    try:
        for load in (pickle.loads, pickle._loads):  # type: ignore[attr-defined]
            with pytest.raises(pickle.UnpicklingError, match=r"posix\.getpid"):
                load(bomb)
        assert pickle.loads(pickle.dumps(entry.call, protocol=protocol)) is entry.call
        assert pickle.loads(pickle.dumps({"a": [1, 2.0, "x", None]}, protocol=protocol))["a"][1] == 2.0
        if protocol > 2:  # older ones spell it exceptions.ValueError
            assert isinstance(pickle.loads(pickle.dumps(ValueError("x"), protocol=protocol)), ValueError)
        with guard.trusted():
            assert pickle.loads(bomb) == os.getpid()
    finally:
        guard.turn_off()
    assert pickle.loads(bomb) == os.getpid()


@pytest.mark.parametrize(
    "attack",
    [
        b"c__builtin__\neval\n(S'1+1'\ntR.",  # Python 2's name of builtins
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"cbuiltins\n__import__\n.",
        b"cbuiltins\nSystemExit\n.",  # ends a process, is no Exception
        b"cturbo_eval.scale.entry\ninstall\n.",
        b"\x80\x04\x8c\x16turbo_eval.scale.entry\x8c\x07install\x93.",
        b"ccopyreg\n_reconstructor\n.",
    ],
)
def test_known_ways_around_are_closed(attack: bytes) -> None:
    guard.turn_on()
    try:
        with pytest.raises(pickle.UnpicklingError):
            pickle.load(io.BytesIO(attack))
    finally:
        guard.turn_off()


def test_a_plain_dask_worker_says_what_it_is() -> None:
    code = "from turbo_eval.scale import entry; print(entry.call('{}'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "turbo-eval worker" in json.loads(done.stdout)["refused"]


# -- files by content ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(folder))
    return folder


def _need(path: Path, name: str) -> Need:
    return Need(kind="model", name=name, sha256=sha256_of(path), size=path.stat().st_size)


def test_bytes_are_kept_only_if_they_are_what_was_announced(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(range(256)) * 40)
    need, content = _need(file, "mine"), Content()
    data = file.read_bytes()
    assert content.locate(need) is None
    assert content.receive(need, 0, data[:4000]) == 4000
    assert content.receive(need, 8000, data[8000:]) == 4000, "a gap is not filled with nothing"
    assert content.locate(need) is None
    assert content.receive(need, 4000, data[4000:]) == need.size
    found = content.locate(need)
    assert found is not None and found.read_bytes() == data and found.is_relative_to(cache)

    found.unlink()
    with pytest.raises(RefusedError, match="bytes sent for mine"):
        content.receive(need, 0, b"x" * need.size)
    assert content.locate(need) is None
    assert not [p for p in (cache / "content").iterdir() if p.name.endswith((".part", ".gguf"))]


def test_a_file_that_was_hashed_before_is_found_by_its_content(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.bin"
    file.write_bytes(b"weights")
    need = _need(file, "mine")
    assert Content().locate(need) is None, "it is not searched for on the disk"
    file_sha256(file)
    assert Content().locate(need) == file.resolve()
    file.write_bytes(b"changed")
    assert FileMemory().find(need.sha256) is None


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_another_file_of_the_same_name_is_refused(cache: Path, tmp_path: Path, place: str) -> None:
    good = tmp_path / "good.gguf"
    good.write_bytes(b"right")
    folder = cache / "models" if place == "cache" else tmp_path / "models"
    folder.mkdir()
    (folder / "mine.gguf").write_bytes(b"wrong")
    content = Content([tmp_path / "models"])
    need = _need(good, "mine")
    file_sha256(good)  # its content is known here; the other file is in the way all the same
    for ask in (content.check, content.locate):
        with pytest.raises(RefusedError) as caught:
            ask(need)
        assert "mine.gguf is not the model mine" in caught.value.sentence()
        assert need.sha256[:12] in caught.value.sentence()
    (folder / "mine.gguf").write_bytes(b"right")
    assert content.locate(need) == folder / "mine.gguf"


def test_a_name_is_no_way_out_of_the_folder(cache: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(b"secret")
    need = Need(kind="model", name="../secret", sha256="0" * 64, size=6)
    assert Content([tmp_path / "models"])._by_name(need) == []


# -- the patched tree ----------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> toys.Toy:
    made = toys.make(tmp_path, monkeypatch)
    monkeypatch.setattr(builds, "MINIMAL", {"main.c": "llama-perplexity"})
    monkeypatch.setattr(builds, "TESTS", {})
    toys.run(sys.executable, "-m", "turbo_eval", "patches", "apply", cwd=made.root)
    return made


def _source(toy: toys.Toy, **other: Any) -> Source:
    tree = toys.run("git", "rev-parse", "HEAD^{tree}", cwd=toy.upstream).strip()
    values = {"backend": "cpu", "tree": tree, "pin": toy.pin, "series": patches.series_sha256()}
    return Source(**{**values, "dirty": False, **other})


class Room:
    """Counts who had the device to build."""

    entered = 0

    def __enter__(self) -> None:
        self.entered += 1

    def __exit__(self, *_: object) -> None: ...


def test_the_same_series_is_built_once(toy: toys.Toy) -> None:
    room = Room()
    made = matching_build(_source(toy), None, room)
    assert made.tree == _source(toy).tree and (made.bin_dir / "llama-perplexity").is_file()
    assert matching_build(_source(toy), None, room) == made
    assert room.entered == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"series": "5" * 64, "tree": "6" * 40}, "another patch series"),
        ({"pin": "7" * 40, "tree": "6" * 40}, "another patch series"),
        ({"dirty": True, "tree": "6" * 40}, "edits that the series does not hold"),
        ({"tree": "bin-" + "8" * 40}, "a build of its own"),
        ({"tree": "6" * 40}, "its sources build tree"),
    ],
)
def test_another_tree_is_refused_with_a_sentence(toy: toys.Toy, other: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError) as caught:
        matching_build(_source(toy, **other), None, Room())
    assert words in caught.value.sentence()


def test_a_tree_that_cannot_be_built_is_said_with_the_compilers_error(toy: toys.Toy) -> None:
    (toy.worktree / "add.c").write_text("int add(int a, int b) { return a +; }\n")
    with pytest.raises(RefusedError, match="could not build") as caught:
        matching_build(_source(toy), None, Room())
    assert "error:" in caught.value.message


# -- requests ------------------------------------------------------------------------------------------


def _ask(cells: Cells, message: Admit | Measure | dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(message) if isinstance(message, dict) else message.model_dump_json()
    return dict(json.loads(cells(text, b"")))


def _measure(**cell: Any) -> Measure:
    source = Source(backend="cpu", tree="a" * 40, pin="p", series="", dirty=False)
    return Measure(
        ticket="t",
        cell=make_cell().model_copy(update=cell),
        source=source,
        needs=(),
        anchor=None,
        threads=1,
        timeout=None,
        references=(),
    )


def test_requests_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    cells = Cells(Device("cpu", "test-2c", 8.0), bin_dir=tmp_path / "nowhere")
    assert "use the same turbo-eval" in _ask(cells, {"op": "run", "command": "id"})["refused"]
    assert "use the same turbo-eval" in _ask(cells, {"op": "admit", "extra": 1})["refused"]
    message = json.loads(_measure().model_dump_json())
    for anchor in ("/etc/passwd", "x"):
        assert "anchor" in _ask(cells, message | {"anchor": anchor})["refused"]
    assert "unknown cache type" in _ask(cells, _measure(k="../../../tmp/x"))["refused"]
    assert (
        "it is for cpu, not for cuda"
        in _ask(
            cells,
            _measure().model_copy(
                update={"source": _measure().source.model_copy(update={"backend": "cuda"})}
            ),
        )["refused"]
    )
    assert "holds no llama-perplexity" in _ask(cells, _measure())["refused"]
