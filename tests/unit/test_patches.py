"""The patch series, on a miniature upstream with real git."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import toy as toys
from tests.support.toy import Toy, commit, run
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama import patches


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return toys.make(tmp_path, monkeypatch)


@pytest.fixture
def patched(toy: Toy) -> Toy:
    """Two patches, refreshed, explained, committed."""
    patches.apply()
    toy.patch("add.c", "return a + b;", "return a + b + 0;", "add : be explicit\n\nWhy: because.")
    toy.patch("main.c", "return 0;", "return 0; // done", "main : say that it is done")
    patches.refresh()
    toy.explain()
    commit(toy.root, "patches")
    return toy


def test_empty_series_is_the_pin(toy: Toy) -> None:
    state = patches.apply()
    assert state.head == toy.pin
    assert state.applied
    assert not state.dirty
    assert patches.check() == []


def test_refresh_names_files_after_subjects(patched: Toy) -> None:
    assert (
        patched.patches / "series"
    ).read_text() == "add-be-explicit.patch\nmain-say-that-it-is-done.patch\n"
    text = (patched.patches / "add-be-explicit.patch").read_text()
    assert text.startswith("From 0000000000000000000000000000000000000000 ")
    assert "Why: because." in text
    assert patches.check() == []
    assert patches.refresh() == []


def test_refresh_does_not_delete_the_whole_series(patched: Toy) -> None:
    run("git", "checkout", "-q", "--detach", patched.pin, cwd=patched.worktree)
    with pytest.raises(UsageError, match="delete the whole series"):
        patches.refresh()
    assert len(list(patched.patches.glob("*.patch"))) == 2


def test_parent_and_submodule_stay_clean(patched: Toy) -> None:
    assert run("git", "status", "--porcelain", cwd=patched.root) == ""
    assert run("git", "rev-parse", "HEAD", cwd=patched.submodule).strip() == patched.pin


def test_same_commit_for_another_user_elsewhere(
    patched: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = patches.status().head
    other = tmp_path / "elsewhere"
    run("git", "clone", "--quiet", str(patched.root), str(other), cwd=tmp_path)
    run("git", "-c", "protocol.file.allow=always", "submodule", "--quiet", "update", "--init", cwd=other)
    config = tmp_path / "gitconfig"
    config.write_text(
        "[user]\nname=Someone Else\nemail=else@example.org\n[diff]\nnoprefix=true\nalgorithm=patience\n"
        "[format]\nsignature=x\nsuffix=.txt\n[core]\nabbrev=5\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(other))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.delenv("GIT_COMMITTER_NAME")
    assert patches.apply().head == here
    assert patches.check() == []


def test_orphan_is_reported(patched: Toy) -> None:
    (patched.patches / "stray.patch").touch()
    assert any("stray.patch is an orphan" in problem for problem in patches.check())


def test_missing_explanation_is_reported(patched: Toy) -> None:
    (patched.patches / "README.md").write_text("add-be-explicit.patch only")
    assert [problem for problem in patches.check() if "README.md does not say why main-" in problem]


def test_listed_but_missing_file_is_reported(patched: Toy) -> None:
    (patched.patches / "add-be-explicit.patch").unlink()
    assert "add-be-explicit.patch, which is not there" in patches.check()[0]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("-    return a + b;", "-    return a - b;", "does not apply"),
        ("+    return a + b + 0;", "+    return a + b + 1;", "is not what git exports"),
        ("Why: because.", "Why: because. \n-- \n2.39.5", "is not what git exports"),
    ],
)
def test_edited_patch_is_reported(patched: Toy, old: str, new: str, sentence: str) -> None:
    file = patched.patches / "add-be-explicit.patch"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    problems = patches.check()
    assert any("add-be-explicit.patch" in problem and sentence in problem for problem in problems), problems


def test_edited_submodule_is_reported(patched: Toy) -> None:
    (patched.submodule / "add.c").write_text("int add;\n")
    assert any("not pristine" in problem for problem in patches.check())


def test_edits_are_neither_lost_nor_ignored(patched: Toy) -> None:
    (patched.worktree / "add.c").write_text("int add(int a, int b) { return b + a; }\n")
    assert patches.status().dirty
    with pytest.raises(UsageError, match="edits that the series does not hold"):
        patches.apply()
    with pytest.raises(UsageError, match="uncommitted edits"):
        patches.refresh()
    assert "b + a" in (patched.worktree / "add.c").read_text()
    assert not patches.apply(force=True).dirty
    assert "b + a" not in (patched.worktree / "add.c").read_text()


def test_unfolded_fixup_is_refused(patched: Toy) -> None:
    patched.patch("add.c", "+ 0", "+ 0 + 0", "fixup! add : be explicit")
    with pytest.raises(UsageError, match="not folded"):
        patches.refresh()


def test_dropping_a_patch_deletes_its_file(patched: Toy) -> None:
    run("git", "reset", "--quiet", "--hard", "HEAD~1", cwd=patched.worktree)
    assert "deleted: main-say-that-it-is-done.patch" in patches.refresh()
    assert not (patched.patches / "main-say-that-it-is-done.patch").exists()


def test_awkward_bytes_survive(toy: Toy) -> None:
    patches.apply()
    (toy.worktree / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    (toy.worktree / "latin1.txt").write_bytes(b"caf\xe9\n")
    (toy.worktree / "blob.bin").write_bytes(bytes(range(256)))
    (toy.worktree / "noeol.txt").write_bytes(b"no newline at the end")
    commit(toy.worktree, "[files] : awkward ones, été\n\nscissors:\n\n-- >8 --\n\nstay")
    tree = run("git", "rev-parse", "HEAD^{tree}", cwd=toy.worktree)
    patches.refresh()
    toy.explain()
    assert patches.check() == []
    patches.apply(force=True)
    assert run("git", "rev-parse", "HEAD^{tree}", cwd=toy.worktree) == tree


def test_rebase_moves_pin_and_series(patched: Toy) -> None:
    new = _upstream_moves(patched, "main.c", "#include <stdio.h>", "#include <stdio.h>\n#include <stdlib.h>")
    state = patches.rebase(new)
    assert state.pin == new
    assert state.applied
    assert patches.check() == []
    changed = run("git", "status", "--porcelain", cwd=patched.root)
    assert "M  llama.cpp" in changed


def test_rebase_conflict_names_three_steps_and_they_work(patched: Toy) -> None:
    new = _upstream_moves(patched, "add.c", "return a + b;", "return b + a;")
    with pytest.raises(UsageError) as caught:
        patches.rebase(new)
    sentence = caught.value.sentence()
    assert all(
        step in sentence for step in ("(1)", "(2) `git am --continue`", "(3)", "add-be-explicit.patch")
    )
    assert patches.status().stopped
    with pytest.raises(UsageError, match="in the middle"):
        patches.apply()
    (patched.worktree / "add.c").write_text("int add(int a, int b) {\n    return b + a + 0;\n}\n")
    run("git", "add", "add.c", cwd=patched.worktree)
    run("git", "am", "--continue", cwd=patched.worktree)
    patches.refresh()
    assert patches.check() == []
    assert len(patches.read_series()) == 2


def test_second_patch_in_conflict_is_the_one_named(patched: Toy) -> None:
    new = _upstream_moves(patched, "main.c", "return 0;", "return 1;")
    with pytest.raises(UsageError, match=r"^main-say-that-it-is-done\.patch conflicts"):
        patches.rebase(new)


def test_empty_submodule_is_named(toy: Toy) -> None:
    run("git", "submodule", "--quiet", "deinit", "--force", "llama.cpp", cwd=toy.root)
    with pytest.raises(EnvironmentProblem, match="is empty") as caught:
        patches.apply()
    assert "make source" in caught.value.next_step


def _upstream_moves(toy: Toy, name: str, old: str, new: str) -> str:
    file = toy.upstream / name
    file.write_text(file.read_text().replace(old, new))
    return commit(toy.upstream, "upstream moves")
