"""The workflows for other people's CI: linted, and their shell steps run one after another on a scratch fork.

Not run here: checkout and setup-python (fork and Python are there), the caches (what they would bring is put
in their place, or nothing), upload and download of artifacts, and GitHub's side of the comment (a stand-in
for `gh` keeps what it is told).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Installed, absent
from tests.integration.test_gate_real import with_moved_centroid
from tests.support import toy
from tests.support.workflow import JobRun, Variables, condition, environment, fill, load, run_job
from turbo_eval.analysis import verdict
from turbo_eval.errors import EnvironmentProblem, TurboEvalError
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama import build as builds
from turbo_eval.llama.build import find_build
from turbo_eval.setup.init import TEMPLATES, init
from turbo_eval.sweep.spec import load_gate
from turbo_eval.util import paths, project

BIN = Path(sys.executable).parent
WORKFLOWS = paths.shipped_workflows()
RUN = WORKFLOWS / "turbo-eval-run.yml"
ZIZMOR = WORKFLOWS.parent / "zizmor.yml"
CALLER = TEMPLATES / "turbo-eval.yml"


def lint(file: Path) -> str:
    """What GitHub's schema, zizmor and shellcheck have against a workflow; "" if nothing."""
    said = ""
    commands: tuple[list[str | Path], ...] = (
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", file],
        [BIN / "zizmor", "--offline", "--quiet", "--config", ZIZMOR, file],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        said += done.stdout + done.stderr if done.returncode else ""
    for job in load(file)["jobs"].values():
        for step in job.get("steps", []):
            if "run" in step:
                # an expression inside a script would be pasted as code; the linter sees a word
                script = "set -eo pipefail\n" + re.sub(r"\$\{\{.+?\}\}", "expression", step["run"])
                shellcheck: list[str | Path] = [BIN / "shellcheck", "--shell=bash", "--format=gcc", "-"]
                done = subprocess.run(shellcheck, input=script, capture_output=True, text=True)
                said += done.stdout
    return said


@pytest.mark.parametrize("file", [*sorted(WORKFLOWS.glob("*.yml")), CALLER], ids=lambda file: file.name)
def test_lint(file: Path) -> None:
    assert lint(file) == ""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("runs-on:", "run-on:", "run-on"),  # the schema
        ("        with:\n          persist-credentials: false\n", "", "artipacked"),  # zizmor
        ('turbo-eval build "$BACKEND"', "turbo-eval build $BACKEND", "SC2086"),  # shellcheck
        ('sweep "$CONFIG"', "sweep ${{ inputs.config }}", "template-injection"),
    ],
)
def test_lint_finds_faults(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    text = RUN.read_text()
    assert old in text
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (folder / RUN.name).write_text(text.replace(old, new))
    assert complaint in lint(folder / RUN.name)


def test_written_workflows_are_the_ones_of_this_repository(tmp_path: Path) -> None:
    init(tmp_path, package="turbo-eval==1.2.3")
    written = tmp_path / ".github" / "workflows"
    assert (written / RUN.name).read_bytes() == RUN.read_bytes()
    assert lint(written / "turbo-eval.yml") == ""
    caller, callee = load(written / "turbo-eval.yml"), load(RUN)
    inputs = callee["on"]["workflow_call"]["inputs"]
    assert {job["with"]["backend"] for job in caller["jobs"].values()} == {"cpu", "metal", "cuda", "vulkan"}
    for job in caller["jobs"].values():
        assert job["uses"] == f"./.github/workflows/{RUN.name}"
        assert job["with"].keys() <= inputs.keys()
        assert job["with"]["package"] == "turbo-eval==1.2.3"
        # GitHub refuses a call that grants less than the called jobs ask for
        assert job["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert inputs["config"]["default"] == "turbo-eval/gates.toml"
    load_gate(tmp_path / inputs["config"]["default"])


def happening(event: str, head: str) -> dict[str, Any]:
    """The `github` context of an event in me/fork; `head` is where a pull request comes from."""
    pull = {"head": {"repo": {"full_name": head}}}
    return {"event_name": event, "repository": "me/fork", "event": {"pull_request": pull}}


def test_comment_is_for_a_verdict_on_a_pull_request_that_may_be_written_to() -> None:
    job = load(RUN)["jobs"]["comment"]

    def due(judged: str, event: str, head: str) -> bool:
        needs = {"evaluate": {"outputs": {"judged": judged}}}
        context = {"needs": needs, "github": happening(event, head)}
        return condition(job["if"], context, {"cancelled": lambda: False})

    assert due("success", "pull_request", "me/fork")
    assert not due("skipped", "pull_request", "me/fork")
    assert not due("success", "pull_request", "you/fork")
    assert not due("success", "push", "")


def test_cuda_runs_where_there_is_a_runner_and_never_for_strangers() -> None:
    job = load(CALLER)["jobs"]["cuda"]

    def due(runner: str, event: str, head: str) -> bool:
        variables = Variables({"TURBO_EVAL_CUDA_RUNNER": runner} if runner else {})
        return condition(job["if"], {"vars": variables, "github": happening(event, head)}, {})

    runner = '["self-hosted", "cuda"]'
    assert due(runner, "push", "")
    assert due(runner, "pull_request", "me/fork")
    assert not due(runner, "pull_request", "you/fork")
    assert not due("", "push", "")
    assert fill(job["with"]["runner"], {"vars": {"TURBO_EVAL_CUDA_RUNNER": runner}}, {}) == runner


def test_vulkan_runs_without_a_gpu_and_a_runner_with_one_never_serves_strangers() -> None:
    job = load(CALLER)["jobs"]["vulkan"]
    steps = load(RUN)["jobs"]["evaluate"]["steps"]
    step = next(s for s in steps if s.get("name") == "Install what Vulkan needs")

    def due(runner: str, event: str, head: str) -> bool:
        variables = Variables({"TURBO_EVAL_VULKAN_RUNNER": runner} if runner else {})
        return condition(job["if"], {"vars": variables, "github": happening(event, head)}, {})

    runner = '["self-hosted", "vulkan"]'
    assert due("", "pull_request", "you/fork") and due("", "push", "")
    assert due(runner, "push", "") and due(runner, "pull_request", "me/fork")
    assert not due(runner, "pull_request", "you/fork")
    assert fill(job["with"]["runner"], {"vars": Variables({})}, {}) == '["ubuntu-24.04"]'
    for backend, hosted, installs in (
        ("vulkan", "github-hosted", True),
        ("vulkan", "self-hosted", False),
        ("cpu", "github-hosted", False),
    ):
        given = {"runner": {"environment": hosted}, "inputs": {"backend": backend}}
        assert condition(step["if"], given, {}) == installs


def test_comment_is_written_once_and_then_replaced(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    gh = tmp_path / "bin" / "gh"
    gh.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$*" >> "$CALLS"\n'
        'case "$*" in *--jq*) if [ -n "$OLD" ]; then echo "$OLD"; fi ;; esac\n'
    )
    gh.chmod(0o755)
    (tmp_path / "verdict.md").write_text(f"{verdict.mark('cpu')}\n### passed\n")
    job = load(RUN)["jobs"]["comment"]
    for old, call in (
        ("", "api --silent repos/me/fork/issues/7/comments --field body=@verdict.md"),
        ("99", "api --silent --method PATCH repos/me/fork/issues/comments/99 --field body=@verdict.md"),
    ):
        calls = tmp_path / f"calls{old}"
        env = environment(Path(sys.executable))
        env |= {"PATH": f"{gh.parent}{os.pathsep}{env['PATH']}", "OLD": old, "CALLS": str(calls)}
        env |= {"GITHUB_REPOSITORY": "me/fork"}
        done = run_job(job, inputs={"backend": "cpu"}, workspace=tmp_path, scratch=tmp_path / "s", env=env)
        assert not done.failed, done.log()
        asked, told = calls.read_text().splitlines()
        assert "<!-- turbo-eval cpu -->" in asked
        assert told == call


# -- the steps on a scratch fork --------------------------------------------------------------------

CODEBOOK = Path("ggml") / "src" / "ggml-common.h"
QUICK = """
[sweep]
models = ["smollm2-135m"]
metrics = ["kld"]
pairs = ["f16:f16", "turbo4:turbo4"]
recent = 0
anchor = "off"
ctx = 256
chunks = 2

[[check]]
name = "turbo4"
pair = "turbo4:turbo4"
max_kld = {bound:.6f}
"""


def fork(folder: Path, source: Path) -> Path:
    """Somebody's llama.cpp with the turbo types in its history: what build/src holds, as one commit."""
    folder.mkdir()
    for command in (
        ("git", "init", "--quiet", "--initial-branch=master"),
        ("git", "fetch", "--quiet", "--depth", "1", source.as_uri(), "HEAD"),
        ("git", "reset", "--quiet", "--hard", "FETCH_HEAD"),
        ("git", "config", "user.name", "Fork Owner"),
        ("git", "config", "user.email", "owner@example.org"),
    ):
        toy.run(*command, cwd=folder)
    return folder


@pytest.fixture
def sources() -> Path:
    try:
        build = find_build("cpu")
    except TurboEvalError as error:
        absent(error)
    if not build.current():
        absent(EnvironmentProblem("build/src is not what was built", "run `make build-cpu`"))
    return paths.worktree_dir()


CACHED = ("models", "corpora", "downloads")


def evaluate(place: Path, scratch: Path, env: Mapping[str, str], package: str, **inputs: str) -> JobRun:
    """The `evaluate` job as the caller's `cpu` job calls it."""
    given = load(RUN)["on"]["workflow_call"]["inputs"]
    values = {name: about.get("default", "") for name, about in given.items()}
    values |= {"backend": "cpu", "package": package, **inputs}
    return run_job(
        load(RUN)["jobs"]["evaluate"],
        inputs=values,
        workspace=place,
        scratch=scratch,
        env=env,
        uses=_files_of_earlier_runs(place),
    )


def _files_of_earlier_runs(place: Path) -> Callable[[Mapping[str, Any]], None]:
    """Stand in for two caches, models with texts and ccache's, by what this machine has of them."""
    mine = {f"turbo-eval/build/cache/{name}": paths.cache_dir() / name for name in CACHED}
    if shutil.which("ccache"):
        mine["turbo-eval/build/ccache"] = Path(
            toy.run("ccache", "--get-config", "cache_dir", cwd=place).strip()
        )

    def uses(step: Mapping[str, Any]) -> None:
        for line in step["with"].get("path", "").split():
            there = mine.get(line)
            if there is not None and there.is_dir() and not (place / line).exists():
                (place / line).parent.mkdir(parents=True, exist_ok=True)
                (place / line).symlink_to(there)

    return uses


def plant(place: Path) -> None:
    """Move a centroid of turbo4 by a fifth, as a commit of the fork."""
    file = place / CODEBOOK
    text = file.read_text()
    table = re.search(r"kvalues_turbo4_mag.*?GGML_TABLE_END", text, re.S)
    assert table and " 77," in table[0]
    file.write_text(text.replace(table[0], table[0].replace(" 77,", " 62,")))
    toy.commit(place, "turbo4 : tune a centroid")


def restore_build(place: Path, monkeypatch: pytest.MonkeyPatch, *, faulty: bool) -> None:
    """What the build cache would bring had this tree been built before, from the clone's own build."""
    ours, folder = find_build("cpu"), place / "turbo-eval" / "build" / "cpu"
    shutil.rmtree(folder / "bin", ignore_errors=True)
    with monkeypatch.context() as there:
        there.setenv("TURBO_EVAL_ROOT", str(place))
        order = builds._order("cpu", "", (), None, None, ["minimal"])
    if faulty:
        with_moved_centroid(ours.bin_dir, folder / "bin")
        for target in order.targets:
            shutil.copy(ours.bin_dir / target, folder / "bin")
    else:
        shutil.copytree(ours.bin_dir, folder / "bin", symlinks=True)
    record = asdict(order.made) | {"bin_dir": "bin"}
    (folder / "turbo-eval-build.json").write_text(json.dumps(record))


def outcomes(run: JobRun) -> dict[str, str]:
    return {step.name: step.outcome for step in run.steps if step.outcome != "uses"}


GREEN = {
    "Install turbo-eval": "success",
    "Install ccache": "skipped",  # only on GitHub's own machines
    "Install what Vulkan needs": "skipped",
    "Key of this build": "success",
    "Build": "success",
    "Sweep": "success",
    "Gate": "success",
    "Summary": "success",
}
SENTENCE = re.compile(
    r"FAIL +turbo4: smollm2-135m turbo4:turbo4: KL divergence 0\.\d+ ± 0\.\d+ from f16/f16,"
    r" at most 0\.\d+ is allowed\."
)


def key_of(run: JobRun) -> str:
    step = next(s for s in run.used if s.get("name") == "The same build from an earlier run")
    return str(step["with"]["key"])


def test_steps_on_a_fork_whose_build_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: Path, smollm: ModelFile
) -> None:
    """Everything but the compiler: build folders are put where the cache would put them."""
    place, env = fork(tmp_path / "fork", sources), environment(Path(sys.executable))
    init(place)
    gates = place / "turbo-eval" / "gates.toml"
    gates.write_text(QUICK.format(bound=1))
    toy.commit(place, "turbo-eval")
    restore_build(place, monkeypatch, faulty=False)
    good = evaluate(place, tmp_path / "good", env, "turbo-eval")
    assert not good.failed, good.log()
    assert outcomes(good) == GREEN
    assert "already" in good.step("Build").output
    assert good.outputs == {"judged": "success"}
    assert good.summary.startswith("<!-- turbo-eval cpu -->\n### turbo-eval on cpu: passed\n")
    assert "| turbo4 | turbo4 |" in good.summary

    # as the how-to says: a bound a little above what a good build gives; it makes no other build
    found = [json.loads(file.read_text())["kld"] for file in place.rglob("results/*/*.json")]
    kld = max(each["mean"] for each in found if each)  # the reference's own run has a perplexity only
    gates.write_text(QUICK.format(bound=1.2 * kld))
    toy.commit(place, "turbo-eval: bound")
    again = evaluate(place, tmp_path / "again", env, "turbo-eval")
    assert not again.failed, again.log()
    assert key_of(again) == key_of(good)
    assert "0 cells run, 2 on record" in again.step("Sweep").output

    plant(place)
    restore_build(place, monkeypatch, faulty=True)
    env |= {"LD_LIBRARY_PATH": str(place / "turbo-eval" / "build" / "cpu" / "bin")}
    bad = evaluate(place, tmp_path / "bad", env, "turbo-eval")
    assert key_of(bad) != key_of(good)
    assert bad.failed
    assert outcomes(bad) == GREEN | {"Gate": "failure"}
    assert SENTENCE.search(bad.step("Gate").output), bad.log()
    assert "### turbo-eval on cpu: 1 check failed" in bad.summary
    assert bad.outputs == {"judged": "success"}

    gates.write_text(QUICK.format(bound=1).replace("max_kld", "max_kdl"))
    wrong = evaluate(place, tmp_path / "wrong", env, "turbo-eval")
    assert wrong.failed
    assert "unknown key 'check.0.max_kdl'; perhaps you meant 'max_kld'" in wrong.step("Gate").output


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_steps_on_a_fork(tmp_path: Path, sources: Path, installed: Installed) -> None:
    """The whole job with the wheel that was installed elsewhere: builds, sweeps two models, judges."""
    place, env = fork(tmp_path / "fork", sources), environment(installed.python)
    toy.run(installed.command, "init", place, cwd=tmp_path, env=env)
    # as it starts, but for the pairs with turbo3 and q4_0: half the time
    gates = place / "turbo-eval" / "gates.toml"
    text = re.sub(r"pairs = .*", 'pairs = ["f16:f16", "q8_0:q8_0", "turbo4:turbo4"]', gates.read_text())
    gates.write_text(text.partition('\n[[check]]\nname = "turbo3 on V alone"')[0])
    toy.commit(place, "turbo-eval")
    assert (place / "turbo-eval" / "project.toml").read_text().count('source = "here"') == 1
    good = evaluate(place, tmp_path / "good", env, str(installed.wheel))
    assert not good.failed, good.log()
    assert outcomes(good) == GREEN
    assert "smollm2-135m" in good.summary and "qwen2.5-coder-0.5b" in good.summary

    plant(place)
    bad = evaluate(place, tmp_path / "bad", env, str(installed.wheel))
    assert bad.failed
    assert outcomes(bad) == GREEN | {"Gate": "failure"}
    assert SENTENCE.search(bad.step("Gate").output), bad.log()
    assert key_of(bad) != key_of(good)
    tree = json.loads((place / "turbo-eval" / "build" / "cpu" / "turbo-eval-build.json").read_text())["tree"]
    left_out = ("rm", "-r", "-q", "--cached", *project.BESIDE_THE_SOURCES)
    toy.run("git", *left_out, cwd=place)
    assert tree == toy.run("git", "write-tree", cwd=place).strip(), "the tree of the fork without our files"
