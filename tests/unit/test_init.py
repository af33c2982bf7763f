"""`turbo-eval init`, and what a project is: built from its own checkout or the pin, patched or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import toy as toys
from tests.support.harness import one_sentence
from turbo_eval.bisect.history import open_history
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.llama import build as builds
from turbo_eval.llama import source
from turbo_eval.llama.build import Build, build
from turbo_eval.setup.init import Written, init
from turbo_eval.sweep import spec
from turbo_eval.util import paths, project

TARGETS = ("llama-perplexity",)


def call(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "turbo_eval", *args], cwd=cwd, capture_output=True, text=True
    )


def happened(files: list[Written]) -> dict[str, str]:
    return {file.path.name: file.what for file in files}


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature fork that `init` takes for llama.cpp, set up and committed."""
    toy = toys.make(tmp_path, monkeypatch)
    for place in ("ggml/include/ggml.h", "include/llama.h", "tools/perplexity/CMakeLists.txt"):
        (toy.upstream / place).parent.mkdir(parents=True)
        (toy.upstream / place).write_text("/* */\n")
    toys.commit(toy.upstream, "looks like llama.cpp")
    init(toy.upstream)
    toys.commit(toy.upstream, "turbo-eval")
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(toy.upstream))
    return toy.upstream


def answer(made: Build) -> str:
    return subprocess.run([made.tool("llama-perplexity")], capture_output=True, text=True).stdout.strip()


def settings(place: Path, **values: str) -> None:
    lines = [f"{name} = {value}" for name, value in values.items()]
    (place / project.FOLDER / project.FILE).write_text("\n".join(lines))


def test_new_folder(tmp_path: Path) -> None:
    done = call("init", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    demo = tmp_path / "demo"
    lines = done.stdout.splitlines()
    assert lines[0] == "evaluates llama.cpp at the pin, with turbo-eval's patches"
    assert lines[-1] == "next: cd demo && turbo-eval build cpu && turbo-eval sweep turbo-eval/gates.toml"
    for line in lines[1:-1]:
        verb, place, *_ = line.split()
        assert verb == "wrote" and (demo / place).is_file()
    assert project.load(demo).settings == project.Settings(source="pinned", patches=True)
    gate = spec.load_gate(demo / "turbo-eval" / "gates.toml")
    assert len(gate.sweep.models) == 2
    assert ("turbo4", "turbo4") in gate.sweep.pairs
    assert (demo / "turbo-eval" / ".gitignore").read_text() == "/build/\n/results/\n"


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    assert set(happened(init(tmp_path)).values()) == {"wrote"}
    gate = tmp_path / "turbo-eval" / "gates.toml"
    gate.write_text("mine")
    again = happened(init(tmp_path))
    assert again.pop("gates.toml") == "kept" and set(again.values()) == {"same"}
    assert gate.read_text() == "mine"
    done = call("init", tmp_path)
    assert "--force overwrites" in done.stdout
    forced = happened(init(tmp_path, force=True))
    assert forced["gates.toml"] == "wrote" and gate.read_text() != "mine"


@pytest.mark.parametrize(
    ("types", "patched", "turbo"),
    [
        ("", None, False),
        ("", True, True),
        ("GGML_TYPE_TURBO3, GGML_TYPE_TURBO4,", None, True),
        ("GGML_TYPE_TURBO3, GGML_TYPE_TURBO4,", False, True),
    ],
)
def test_a_fork_is_evaluated_itself(tmp_path: Path, types: str, patched: bool | None, turbo: bool) -> None:
    (tmp_path / "ggml" / "include").mkdir(parents=True)
    (tmp_path / "ggml" / "include" / "ggml.h").write_text(f"enum ggml_type {{ {types} }};")
    (tmp_path / "include").mkdir()
    for place in ("CMakeLists.txt", "include/llama.h"):
        (tmp_path / place).touch()
    init(tmp_path, patched=patched)
    assert project.load(tmp_path).settings == project.Settings(source="here", patches=bool(patched))
    pairs = spec.load_gate(tmp_path / "turbo-eval" / "gates.toml").sweep.pairs
    assert (("turbo3", "turbo3") in pairs) == turbo, "only types that will be there"


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = call("init", tmp_path / "file")
    assert done.returncode == 2 and one_sentence(done.stderr) and "is a file" in done.stderr
    done = call("init", paths.shipped())
    assert done.returncode == 2 and "is a checkout of turbo-eval" in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sorce = 'here'", "unknown key 'sorce'; perhaps you meant 'source'"),
        ("source = 'there'", "source: Input should be 'pinned' or 'here'"),
        ("patches = ", "is not TOML"),
        ("[types]\na = { block = 32, bytes = 4 }", "unknown key 'types.a.bytes'"),
        ("[types]\na = { block = 0, block_bytes = 4 }", "types.a.block: Input should be greater than"),
    ],
)
def test_wrong_project_file(tmp_path: Path, text: str, sentence: str) -> None:
    init(tmp_path)
    (tmp_path / "turbo-eval" / "project.toml").write_text(text)
    done = call("plan", "--pairs", "f16:f16", cwd=tmp_path)
    assert done.returncode == 2
    assert one_sentence(done.stderr) and sentence in done.stderr


def test_types_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(tmp_path)
    file = tmp_path / "turbo-eval" / "project.toml"
    file.write_text("[types]\ntq2_0 = { block = 64, block_bytes = 18 }\n")
    with pytest.raises(UsageError, match="unknown cache type 'tq2_0'"):
        cache_type("tq2_0")
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(tmp_path))
    assert cache_type("tq2_0").bpv == 2.25
    with pytest.raises(UsageError) as caught:
        cache_type("tq2")
    assert "perhaps you meant 'tq2_0'" in caught.value.next_step


def test_project_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBO_EVAL_ROOT", raising=False)
    init(tmp_path)
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert paths.repo_root() == tmp_path / "turbo-eval"
    assert paths.patches_dir() == paths.shipped() / "patches"
    (deep / "patches").mkdir()
    (deep / "patches" / "series").touch()  # a clone inside a project is itself
    assert paths.project() is None


def test_own_tree(fork: Path) -> None:
    made, worked = build("cpu", targets=TARGETS)
    assert worked
    assert made.bin_dir == fork / "turbo-eval" / "build" / "cpu" / "bin"
    assert (answer(made), made.patched, made.dirty) == ("3", False, False)
    assert made.pin == toys.run("git", "rev-parse", "HEAD", cwd=fork).strip()
    assert made.tree == toys.run("git", "rev-parse", "HEAD~1^{tree}", cwd=fork).strip(), "without our files"
    key = builds.stamp("cpu")

    # a commit without a change of the sources, bounds, how-to: nothing to compile
    toys.run("git", "commit", "--quiet", "--allow-empty", "--message", "nothing", cwd=fork)
    same, worked = build("cpu", targets=TARGETS)
    assert not worked and same.tree == made.tree
    assert builds.find_build("cpu").pin == same.pin != made.pin
    (fork / "turbo-eval" / "gates.toml").write_text("# other bounds\n")
    assert build("cpu", targets=TARGETS) == (same, False)
    assert builds.stamp("cpu") == key
    (fork / "add.c").write_text("int add(int a, int b) { return 10 * a + b; }\n")
    assert not made.current()
    assert builds.stamp("cpu") != key
    edited, worked = build("cpu", targets=TARGETS)
    assert worked and edited.dirty
    assert answer(edited) == "12"
    assert not toys.run("git", "status", "--porcelain", "--", "turbo-eval/build", cwd=fork)


def test_what_is_too_old_is_not_built(fork: Path) -> None:
    toys.run("git", "rm", "-r", "--quiet", "tools", cwd=fork)
    with pytest.raises(UsageError, match="has no tools/perplexity"):
        build("cpu")


def test_bisect_looks_for_commits_of_the_fork(fork: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = open_history(None, series=False)
    assert (history.repo, history.ours) == (fork, False)
    settings(fork, source='"pinned"')
    with pytest.raises(UsageError, match="has no commits to bisect"):
        open_history(None, series=False)


def test_patches_that_do_not_fit(fork: Path) -> None:
    settings(fork, source='"here"', patches="true")
    with pytest.raises(UsageError, match=r"\.patch does not apply to ") as caught:
        build("cpu", targets=TARGETS)
    assert "build it with --no-patches" in caught.value.next_step
    made, _ = build("cpu", targets=TARGETS, patched=False)
    assert answer(made) == "3"
    (fork / "add.c").write_text("int add(int a, int b) { return 10 * a + b; }\n")
    with pytest.raises(UsageError, match="edits that are not committed"):
        build("cpu", targets=TARGETS)


def test_patches_on_a_fork(fork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The series goes onto HEAD, in a repository apart from the fork's own; moved HEAD, moved build."""
    shipped = tmp_path / "shipped"
    (shipped / "patches").mkdir(parents=True)
    monkeypatch.setattr(paths, "shipped", lambda: shipped)
    (shipped / "patches" / "series").write_text("add-times-ten.patch\n")
    (shipped / "patches" / "pin").write_text("0" * 40)
    (fork / "add.c").write_text("int add(int a, int b) {\n    return 10 * a + b;\n}\n")
    toys.commit(fork, "add : times ten")
    patch = toys.run("git", "format-patch", "--stdout", "--keep-subject", "-1", cwd=fork)
    (shipped / "patches" / "add-times-ten.patch").write_text(patch)
    toys.run("git", "reset", "--quiet", "--hard", "HEAD~1", cwd=fork)

    settings(fork, source='"here"', patches="true")
    before = toys.run("git", "worktree", "list", cwd=fork)
    made, _ = build("cpu", targets=TARGETS)
    assert (answer(made), made.patched, made.dirty) == ("12", True, False)
    assert made.current()
    assert toys.run("git", "worktree", "list", cwd=fork) == before, "nothing of ours in the fork's repository"
    (fork / "main.c").write_text((fork / "main.c").read_text().replace("add(1, 2)", "add(2, 2)"))
    toys.commit(fork, "main : another sum")
    moved, worked = build("cpu", targets=TARGETS)
    assert worked and answer(moved) == "22"
    assert moved.tree != made.tree
    plain, _ = build("cpu", targets=TARGETS, patched=False)
    assert answer(plain) == "4"


def test_own_tree_must_be_a_git_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(tmp_path)
    settings(tmp_path, source='"here"', patches="false")
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match="is not the top of a git checkout with a commit"):
        build("cpu")


def test_missing_build_names_our_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(tmp_path)
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="the cpu build is not there") as caught:
        builds.find_build("cpu")
    assert caught.value.next_step == "run `turbo-eval build cpu`"


@pytest.mark.network
def test_pinned_source_from_the_sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(tmp_path)
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(tmp_path))
    assert source.ensure_source(offline_route=True) == "sdist"
    assert source.state().ready
    assert source.ensure_source() == "present"
    assert source.pin() == (paths.shipped() / "patches" / "pin").read_text().strip()


def test_upstream_is_the_submodules() -> None:
    url = toys.run("git", "config", "-f", ".gitmodules", "submodule.llama.cpp.url", cwd=paths.shipped())
    assert url.strip() == source.UPSTREAM
