"""bisect: git finds it, what doesn't build is skipped, an interruption costs nothing twice.

The default tests search a miniature of llama.cpp whose llama-perplexity becomes the real one, with the
attention rotation switched off by a constant in its source: real git, cmake, ninja, model and numbers.
The slow test plants a fault in a history of llama.cpp itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import toy
from turbo_eval.bisect.condition import Condition
from turbo_eval.errors import TurboEvalError, UsageError
from turbo_eval.inputs.kv_profile import Profile, model_shape, write_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.util import paths

MAIN = """\
#include <stdlib.h>
#include <unistd.h>
#include "rotation.h"
int main(int argc, char ** argv) {
    (void) argc;
    if (!ROTATION) {
        setenv("LLAMA_ATTN_ROT_DISABLE", "1", 1);
    }
    execv("REAL", argv);
    return 1;
}
"""


@pytest.mark.parametrize(
    ("text", "values", "bad"),
    [
        ("ppl > 1.05 * baseline", {"ppl": 10.6, "baseline": 10}, True),
        ("ppl > 1.05 * baseline", {"ppl": 10.4, "baseline": 10}, False),
        ("kld >= 0.1 or same_top < 90", {"kld": 0.05, "same_top": 89}, True),
        ("not (ppl - f16 < 2)", {"ppl": 13, "f16": 10}, True),
    ],
)
def test_condition(text: str, values: dict[str, float], bad: bool) -> None:
    assert Condition(text).holds(values) is bad


@pytest.mark.parametrize(
    "text",
    ["ppl", "ppl >", "1 > 0", "pp1 > 3", "__import__('os') > 1", "ppl > (lambda: 1)()", "baseline > 1"],
)
def test_bad_condition_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Condition(text)
    assert "\n" not in caught.value.sentence()


@dataclass
class Clone:
    """A miniature llama.cpp with one commit a step; `commits[0]` is good."""

    path: Path
    commits: list[str]


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build) -> Clone:
    """Twelve commits; the rotation goes in the 6th, the 4th and 5th don't compile."""
    configs = paths.configs_dir()
    made = toy.make(tmp_path / "project", monkeypatch)
    monkeypatch.delenv("TURBO_EVAL_CACHE")
    (made.root / "configs").symlink_to(configs)
    repo = made.upstream
    (repo / "CMakeLists.txt").write_text(
        (repo / "CMakeLists.txt").read_text().replace("main.c add.c", "main.c")
    )
    (repo / "main.c").write_text(MAIN.replace("REAL", str(build.tool("llama-perplexity"))))
    (repo / "rotation.h").write_text("#define ROTATION 1\n")
    commits = [toy.commit(repo, "good")]
    for step in range(1, 13):
        (repo / "notes.h").write_text(f"// {step}\n")
        (repo / "rotation.h").write_text(
            f"#define ROTATION {int(step < 6)}\n" + ("#error half done\n" if step in (4, 5) else "")
        )
        commits.append(toy.commit(repo, f"step {step}"))
    return Clone(repo, commits)


QUICK = ("--ctx", "64", "--chunks", "4", "--threads", "1")


def bisect(
    clone: Path, good: str, bad: str, cell: str, *more: str, model: ModelFile
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turbo_eval", "bisect", "--repo", str(clone), "--good", good]
    command += ["--bad", bad, "--cell", cell, "--bad-if", "ppl > 1.05 * baseline"]
    command += ["--model", str(model.path), *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.build
def test_skips_what_does_not_build_and_resumes(miniature: Clone, build: Build, smollm: ModelFile) -> None:
    if "turbo3" not in capabilities(build).cache_types:
        pytest.skip("the build has no turbo types")
    good, bad = miniature.commits[3], miniature.commits[12]
    dry = bisect(miniature.path, good, bad, "turbo3:turbo3", *QUICK, "--dry-run", model=smollm)
    assert dry.returncode == 0, dry.stderr
    assert "9 commits to search: 4 steps, at most 5 builds" in dry.stdout
    # Between 3 (good) and 6 (bad) nothing compiles: any of 4, 5 and 6 may be the first bad one.
    hidden = bisect(miniature.path, good, bad, "turbo3:turbo3", *QUICK, model=smollm)
    assert hidden.returncode == 3, hidden.stdout + hidden.stderr
    among = hidden.stdout.split("among:")[1]
    assert {f"step {n}" for n in (4, 5, 6)} == set(re.findall(r"step \d+", among))
    again = bisect(miniature.path, good, bad, "turbo3:turbo3", *QUICK, model=smollm)
    assert again.returncode == 3
    assert ", 0 built, " in again.stdout, "trees, good or failed, are kept"
    branches = toy.run("git", "status", cwd=miniature.path)
    assert "bisect" not in branches, "the clone itself is not in the middle of anything"


@pytest.mark.build
def test_finds_the_commit_with_the_numbers_on_both_sides(
    miniature: Clone, build: Build, smollm: ModelFile, tmp_path: Path
) -> None:
    if "turbo3" not in capabilities(build).cache_types:
        pytest.skip("the build has no turbo types")
    repo = miniature.path
    toy.run("git", "checkout", "--quiet", "-b", "clean", miniature.commits[3], cwd=repo)
    for step, rotation in (("a", 1), ("b", 0), ("c", 0)):
        (repo / "rotation.h").write_text(f"#define ROTATION {rotation} // {step}\n")
        toy.commit(repo, f"clean {step}")
    profile, shape = tmp_path / "all-turbo3.gguf", model_shape(smollm.path)
    types = ("turbo3",) * shape.n_layer
    write_profile(Profile(types, types, recent=0, first=0), shape, profile)
    for cell in ("turbo3:turbo3", str(profile)):
        found = bisect(repo, miniature.commits[3], "clean", cell, *QUICK, model=smollm)
        assert found.returncode == 0, found.stdout + found.stderr
        first = re.search(r"first bad: \w{12} clean b: ppl ([\d.]+)", found.stdout)
        before = re.search(r"before it: \w{12} clean a: ppl ([\d.]+)", found.stdout)
        assert first is not None, found.stdout
        assert before is not None, found.stdout
        assert float(first[1]) > 1.05 * float(before[1])
    swapped = bisect(repo, "clean", miniature.commits[3], "turbo3:turbo3", *QUICK, model=smollm)
    assert swapped.returncode == 2
    assert "--good must be an ancestor of --bad" in swapped.stderr


# Where the CPU reads V, and a wrong version for turbo4: the second group of 32 taken from the first. The
# tiled kernel reads V itself; without that patch the reference function does.
READERS = (
    (
        "ggml/src/ggml-cpu/fattn-quant.cpp",
        "type.unpack(v, nb1, n, DV, w.tmp, w.d, w.m);",
        """type.unpack(v, nb1, n, DV, w.tmp, w.d, w.m);
    if (type.unpack == fa_get_type(GGML_TYPE_TURBO4).unpack) {
        for (int64_t i = 0; i < n*DV; i += 64) {
            memcpy(w.tmp + i + 32, w.tmp + i, 32);
        }
    }""",
    ),
    (
        "ggml/src/ggml-turbo.c",
        "ggml_turbo4_unpack_group(&x[ib], g, v);",
        "ggml_turbo4_unpack_group(&x[ib], 0, v);",
    ),
)


@pytest.mark.slow
@pytest.mark.build
@pytest.mark.timeout(3600)
def test_a_wrong_v_subblock_in_sixteen_commits_takes_five_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm: ModelFile
) -> None:
    """The report's "binary search in progress", on llama.cpp itself."""
    source = Path(os.environ.get("TURBO_EVAL_TEST_SOURCE") or paths.worktree_dir())
    if not (source / READERS[1][0]).is_file():
        pytest.skip("there is no patched llama.cpp in build/src")
    clone, root = tmp_path / "llama.cpp", tmp_path / "root"
    toy.run("git", "clone", "--quiet", "--shared", source, clone, cwd=tmp_path)
    toy.run("git", "clone", "--quiet", "--no-recurse-submodules", paths.repo_root(), root, cwd=tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Toy Maker")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "toy@example.org")
    reader, right, wrong = next(r for r in READERS if (clone / r[0]).is_file())
    harmless = ("ggml/src/ggml-turbo.c", "ggml/src/ggml-cpu/turbo.c", "README.md")
    for step in range(1, 17):
        file = clone / harmless[step % 3]
        file.write_text(file.read_text() + f"// step {step}\n")
        if step == 9:
            text = (clone / reader).read_text()
            assert text.count(right) == 1
            (clone / reader).write_text(text.replace(right, wrong))
        toy.commit(clone, f"step {step}")
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(root))
    size = ("--ctx", "256", "--chunks", "1")
    done = bisect(clone, "HEAD~16", "HEAD", "q8_0:turbo4", *size, model=smollm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"first bad: \w{12} step 9:", done.stdout), done.stdout
    builds = re.search(r"(\d+) built", done.stdout)
    assert builds is not None
    assert int(builds[1]) <= 5


def test_a_fresh_repository_bisects_its_own_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits of this repository become the llama.cpp that each makes: its pin under its patches."""
    from turbo_eval.bisect.history import UntestableError, open_history, series_commits
    from turbo_eval.llama import patches

    made = toy.make(tmp_path, monkeypatch)
    patches.apply()
    made.patch("add.c", "a + b", "a - b", "add: subtract")
    patches.refresh()
    made.patch("main.c", "1, 2", "3, 4", "main: other numbers")
    patches.refresh()
    made.explain()
    whole = toy.commit(made.root, "two patches")
    history = open_history(None, series=False)
    llama = history.llama_commit(whole)
    assert "a - b" in toy.run("git", "show", f"{llama}:add.c", cwd=made.submodule)
    assert history.llama_commit(f"{whole}^") == made.pin
    series = series_commits(open_history(None, series=True))
    assert series[0] == made.pin
    assert [
        toy.run("git", "log", "-1", "--format=%s", c, cwd=made.submodule).strip() for c in series[1:]
    ] == [
        "add: subtract",
        "main: other numbers",
    ]
    broken = made.patches / patches.read_series()[0].name
    broken.write_text(broken.read_text().replace("a + b", "a * b"))
    with pytest.raises(UntestableError):
        history.llama_commit(toy.commit(made.root, "a patch that does not apply"))
    assert issubclass(UntestableError, TurboEvalError)
