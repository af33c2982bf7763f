"""The submodule from the package index, proven by git's own hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import toy as toys
from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama import source
from turbo_eval.util import paths

PIN_TREE = "b2da53584951ec8aa40680229509a6646a637560"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh clone of this repository, whose submodule is empty."""
    here, there = paths.repo_root(), tmp_path / "clone"
    toys.run("git", "clone", "--quiet", "--no-local", "--depth", "1", here.as_uri(), str(there), cwd=tmp_path)
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(there))
    return there


@pytest.mark.network
def test_submodule_from_the_sdist(clone: Path) -> None:
    assert source.state().head == ""
    assert source.ensure_source(offline_route=True) == "sdist"
    assert source.state().ready
    tree = toys.run("git", "rev-parse", "HEAD^{tree}", cwd=clone / "llama.cpp").strip()
    if source.pin() == "0c1e57098bba43ac29e6e3b677cdceebdd22334f":
        assert tree == PIN_TREE
    toys.run("git", "fsck", "--no-dangling", cwd=clone / "llama.cpp")
    assert toys.run("git", "status", "--porcelain", cwd=clone) == ""
    assert "github.com/ggml-org" in toys.run("git", "remote", "get-url", "origin", cwd=clone / "llama.cpp")
    assert source.ensure_source() == "present"

    # emptied, and filled again from the repository that is still there
    toys.run("git", "submodule", "--quiet", "deinit", "--force", "llama.cpp", cwd=clone)
    assert source.ensure_source(offline_route=True) == "sdist"

    (clone / "llama.cpp" / "README.md").write_text("edited")
    with pytest.raises(EnvironmentProblem, match="has local changes"):
        source.ensure_source()


@pytest.mark.network
def test_sdist_of_another_pin_is_refused(clone: Path) -> None:
    other = "1234567890123456789012345678901234567890"
    toys.run("git", "update-index", "--cacheinfo", f"160000,{other},llama.cpp", cwd=clone)
    with pytest.raises(EnvironmentProblem, match=f"carries another commit than the pin {other}"):
        source.ensure_source(offline_route=True)
    assert source.state().head == ""


def test_upstream_route_and_moved_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary route, with an upstream that answers."""
    toy = toys.make(tmp_path, monkeypatch)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.file.allow")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    (toy.upstream / "add.c").write_text("int add(int a, int b) { return b + a; }\n")
    moved = toys.commit(toy.upstream, "moves")
    toys.run("git", "update-index", "--cacheinfo", f"160000,{moved},llama.cpp", cwd=toy.root)
    assert source.ensure_source() == "upstream"
    assert source.state().head == moved
    toys.run("git", "submodule", "--quiet", "deinit", "--force", "llama.cpp", cwd=toy.root)
    assert source.ensure_source() == "upstream"


def test_killed_clone_and_killed_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys.make(tmp_path, monkeypatch)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.file.allow")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    (toy.submodule / "add.c").unlink()
    assert source.ensure_source() == "present"
    assert (toy.submodule / "add.c").is_file()

    toys.run("git", "submodule", "--quiet", "deinit", "--force", "llama.cpp", cwd=toy.root)
    mine = toys.run("git", "rev-parse", "HEAD", cwd=toy.root / ".git" / "modules" / "llama.cpp")
    source._remove_wreck(toy.root)  # emptied on purpose is no wreck: its repository may hold work
    assert toys.run("git", "rev-parse", "HEAD", cwd=toy.root / ".git" / "modules" / "llama.cpp") == mine
    assert source.ensure_source() == "upstream"

    for file in toy.submodule.iterdir():
        if file.name != ".git":
            file.unlink()
    (toy.root / ".git" / "modules" / "llama.cpp" / "HEAD").unlink()
    assert source.state().head == ""
    assert source.ensure_source() == "upstream"
    assert source.state().ready


def test_silent_upstream_fails_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys.make(tmp_path, monkeypatch)
    toys.run(
        "git", "config", "-f", ".gitmodules", "submodule.llama.cpp.url", "http://127.0.0.1:9/x", cwd=toy.root
    )
    assert "ls-remote" in source._from_upstream(toy.root)


def test_folder_that_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="is no turbo-eval checkout"):
        source.pin()
