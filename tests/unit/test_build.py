"""Builds of a miniature upstream with real cmake, ninja and compiler."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support import toy as toys
from tests.support.toy import Toy, commit
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama import build as builds
from turbo_eval.llama import patches, provenance, toolchain
from turbo_eval.llama.backends import cuda
from turbo_eval.llama.build import Build, build, find_build
from turbo_eval.records.provenance import Provenance

TARGETS = ("llama-perplexity",)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = toys.make(tmp_path, monkeypatch)
    patches.apply()
    return made


def _answer(made: Build) -> str:
    return subprocess.run(
        [made.tool("llama-perplexity")], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_build_again_only_when_something_changed(toy: Toy) -> None:
    made, worked = build("cpu", targets=TARGETS)
    assert worked
    assert _answer(made) == "3"
    assert (made.pin, made.dirty) == (toy.pin, False)
    assert made.tree == toys.run("git", "rev-parse", "HEAD^{tree}", cwd=toy.upstream).strip()
    assert build("cpu", targets=TARGETS) == (made, False)
    assert find_build("cpu") == made
    assert made.current()

    (toy.worktree / "add.c").write_text("int add(int a, int b) { return 10 * a + b; }\n")
    assert not made.current()
    edited, worked = build("cpu", targets=TARGETS)
    assert worked
    assert edited.dirty
    assert edited.tree != made.tree
    assert _answer(edited) == "12"

    other, worked = build("cpu", targets=TARGETS, extra=["CMAKE_C_FLAGS=-O1"])
    assert worked
    assert other.stamp != edited.stamp
    assert "CMAKE_C_FLAGS=-O1" in other.flags


def test_changed_series_is_applied_before_building(toy: Toy) -> None:
    build("cpu", targets=TARGETS)
    toy.patch("add.c", "a + b", "a - b", "add : subtract")
    patches.refresh()
    toy.explain()
    commit(toy.root, "patches")
    patches.apply()
    toys.run("git", "checkout", "--quiet", "--detach", toy.pin, cwd=toy.worktree)  # as an older clone has it
    made, worked = build("cpu", targets=TARGETS)
    assert worked
    assert not made.dirty
    assert _answer(made) == "-1"


def test_failed_build_says_the_compilers_error(toy: Toy) -> None:
    build("cpu", targets=TARGETS)
    (toy.worktree / "add.c").write_text("int add(int a, int b) { return a +; }\n")
    with pytest.raises(
        EnvironmentProblem, match=r"the cpu build failed: .*add\.c.*error: expected expression"
    ):
        build("cpu", targets=TARGETS)
    with pytest.raises(EnvironmentProblem, match="was not finished"):
        find_build("cpu")


def test_moved_clone_builds(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("cpu", targets=TARGETS)
    (toy.worktree / "add.c").write_text("int add(int a, int b) { return a * b; }\n")
    moved = tmp_path / "moved"
    toy.root.rename(moved)
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(moved))
    made, _ = build("cpu", targets=TARGETS)
    assert made.bin_dir == moved / "build" / "cpu" / "bin"
    assert _answer(made) == "2"  # the edit survived the move


def test_foreign_folder(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no llama-perplexity"):
        Build.from_bin_dir(tmp_path)
    made, _ = build("cpu", targets=TARGETS)
    assert Build.from_bin_dir(made.bin_dir) == made
    foreign = tmp_path / "foreign"
    shutil.copytree(made.bin_dir, foreign)
    described = Build.from_bin_dir(foreign)
    assert described.tree.startswith("bin-")
    assert (described.stamp, described.backend, described.current()) == ("", "cpu", True)
    with (foreign / "llama-perplexity").open("ab") as stream:
        stream.write(b"\0")
    assert Build.from_bin_dir(foreign).tree != described.tree


def test_missing_things_name_their_remedy(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="the cpu build is not there") as caught:
        find_build("cpu")
    assert "make build-cpu" in caught.value.next_step
    with pytest.raises(UsageError, match="no backend opencl"):
        build("opencl")
    made, _ = build("cpu", targets=TARGETS)
    with pytest.raises(EnvironmentProblem, match="has no llama-bench"):
        made.tool("llama-bench")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblem, match=r"no C\+\+ compiler \(no-such-compiler"):
        build("cpu")


def test_metal_needs_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(EnvironmentProblem, match="needs macOS"):
        builds.options("metal")


def test_cuda_needs_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "c++").symlink_to(shutil.which("c++") or "/usr/bin/c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda, "NVCC_BY_DEFAULT", tmp_path / "nvcc")
    with pytest.raises(EnvironmentProblem, match="the CUDA build needs nvcc"):
        builds.options("cuda")


def test_cuda_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(cuda, "has_nvidia_gpu", lambda: True)
    assert cuda.nvcc().version == "nvcc 12.9"
    assert builds.options("cuda")["CMAKE_CUDA_ARCHITECTURES"] == "native"
    assert builds.options("cuda", cuda_archs="86-real")["CMAKE_CUDA_ARCHITECTURES"] == "86-real"
    monkeypatch.setattr(cuda, "has_nvidia_gpu", lambda: False)
    assert builds.options("cuda")["CMAKE_CUDA_ARCHITECTURES"] == cuda.ARCHS_WITHOUT_GPU


def test_old_cmake_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "cmake"
    old.write_text("#!/bin/sh\necho cmake version 3.16.3\n")
    old.chmod(0o755)
    monkeypatch.setattr(toolchain, "_candidates", lambda _: [old])
    with pytest.raises(EnvironmentProblem, match=r"cmake 3\.24 or newer is needed .* cmake version 3\.16\.3"):
        toolchain.find("cmake")


def test_provenance_says_what_and_not_who(toy: Toy) -> None:
    made, _ = build("cpu", targets=TARGETS)
    known = provenance.collect(made)
    assert (known.tree, known.pin, known.flags) == (made.tree, toy.pin, made.flags)
    assert known.series == patches.series_sha256()
    assert known.machine.cores >= 1
    host = subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True).stdout.strip()
    assert host not in known.model_dump_json()
    assert Provenance.model_validate_json(known.model_dump_json()) == known
    foreign = Build(**(asdict(made) | {"stamp": ""}))
    assert provenance.collect(foreign).series == ""


def test_tools_by_name() -> None:
    assert "llama-server" not in builds._wanted(["minimal"]).values()
    assert set(builds._wanted(["minimal", "llama-server"]).values()) == {
        *builds.MINIMAL.values(),
        "llama-server",
    }
    assert builds._wanted(builds.ALL) == builds.TOOLS
    with pytest.raises(UsageError, match="no tool 'llama-serve' to build") as caught:
        builds._wanted(["minimal", "llama-serve"])
    assert "perhaps you meant 'llama-server'" in caught.value.next_step


def test_no_tool_of_other_sources_stays(toy: Toy) -> None:
    made, _ = build("cpu", targets=TARGETS)
    server = made.bin_dir / "llama-server"
    server.write_text("of these sources")
    assert build("cpu", targets=TARGETS) == (made, False)
    assert server.is_file()
    (toy.worktree / "add.c").write_text("int add(int a, int b) { return a * b; }\n")
    build("cpu", targets=TARGETS)
    assert not server.exists()
