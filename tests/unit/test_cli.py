"""The console script from outside: exit codes, one sentence on stderr, clean stdout."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import toy as toys
from turbo_eval import commands
from turbo_eval.cli import COMMANDS, load
from turbo_eval.errors import EnvironmentProblem, TurboEvalError, UsageError
from turbo_eval.llama.build import find_build
from turbo_eval.util import paths


def call(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "turbo_eval", *args],
        capture_output=True,
        text=True,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["models", "get", "smollm"], 2, "there is no model smollm; perhaps you meant 'smollm2-135m'"),
        (["models", "path", "/nowhere.gguf"], 2, "there is no model file /nowhere.gguf"),
        (["corpora", "get", "/nowhere.txt"], 2, "there is no text file /nowhere.txt"),
        (["build", "vulkan"], 2, "there is no backend vulkan; choose one of cpu, metal, cuda"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], code: int, sentence: str) -> None:
    done = call(*args)
    assert done.returncode == code
    assert done.stdout == ""
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_traceback_on_request() -> None:
    assert "Traceback" in call("models", "get", "smollm", TURBO_EVAL_DEBUG="1").stderr


def test_help_shows_every_command() -> None:
    text = call("--help").stdout
    assert all(
        name in text for name in ("doctor", "source", "patches", "build", "models", "corpora", "sweep")
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_what_the_command_says_of_itself(name: str) -> None:
    panel, summary = COMMANDS[name]
    command = load(name)
    said = " ".join((command.help or "").strip().split("\n\n")[0].split())
    assert (command.name, said) == (name, summary)
    assert panel in (getattr(command, "rich_help_panel", None), None)


def test_every_module_of_commands_is_in_the_registry() -> None:
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert modules - {"options", "_assets"} == set(COMMANDS)


def test_a_mistyped_command_is_one_sentence() -> None:
    done = call("sweeep")
    assert done.returncode == 2 and "did you mean 'sweep'" in done.stderr.lower()


def test_unwritable_cache_is_one_sentence(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    done = call("source", "--sdist-path", TURBO_EVAL_CACHE=str(in_the_way))
    assert done.returncode == 4
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(in_the_way) in done.stderr


def test_patches_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys.make(tmp_path, monkeypatch)
    assert "not applied" in call("patches", "status").stdout
    assert call("patches", "apply").returncode == 0
    toy.patch("add.c", "a + b", "b + a", "add : turn around")
    assert call("patches", "refresh").stdout == "new: add-turn-around.patch\nchanged: series\n"
    done = call("patches", "check")
    assert done.returncode == 1
    assert "README.md does not say why add-turn-around.patch" in done.stderr
    toy.explain()
    assert call("patches", "check").returncode == 0


def test_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys.make(tmp_path, monkeypatch)
    (toy.root / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    done = call("doctor", "--json")
    assert done.returncode == 4
    findings = {(item["section"], item["name"]): item for item in json.loads(done.stdout)}
    assert findings["source", "upstream"]["detail"] == f"at the pin {toy.pin}, pristine"
    assert findings["source", "patches"]["fix"] == "turbo-eval patches apply"
    assert findings["builds", "cpu"]["fix"] == "run `make build-cpu`"
    assert not findings["models", "smollm2-135m"]["ok"]
    assert "turbo-eval models get smollm2-135m" in findings["models", "smollm2-135m"]["fix"]


@pytest.mark.build
def test_doctor_finds_the_bindings_on_our_library() -> None:
    try:
        find_build("cpu")
    except EnvironmentProblem as error:
        pytest.skip(error.sentence())
    findings = {(item["section"], item["name"]): item for item in json.loads(call("doctor", "--json").stdout)}
    loaded = findings["bindings", "llama-cpp-python"]
    assert loaded["ok"], loaded
    assert str(paths.build_dir("cpu") / "bin" / "libllama") in loaded["detail"]


def test_sentences_end_once() -> None:
    assert UsageError("a is wrong.", "do b.").sentence() == "a is wrong; do b."
    assert TurboEvalError("a is wrong").sentence() == "a is wrong."
