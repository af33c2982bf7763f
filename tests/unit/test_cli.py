"""The console script from outside: exit codes, one sentence on stderr, clean stdout."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import toy as toys
from tests.support.records import make_kld, make_record
from turbo_eval import commands
from turbo_eval.analysis.picture.points import front
from turbo_eval.analysis.picture.terminal import bars
from turbo_eval.analysis.summary import summarize
from turbo_eval.cli import COMMANDS, load
from turbo_eval.errors import EnvironmentProblem, TurboEvalError, UsageError
from turbo_eval.llama.build import find_build
from turbo_eval.records.store import Store
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
        (["build", "opencl"], 2, "there is no backend opencl; choose one of cpu, metal, cuda, vulkan"),
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


# -- turbo-eval, and nothing else ----------------------------------------------------------------------


def greeted(monkeypatch: pytest.MonkeyPatch, folder: Path, **env: str) -> tuple[str, list[str]]:
    """The sentence and the commands that a newcomer in `folder` sees."""
    for name in ("TURBO_EVAL_ROOT", "TURBO_EVAL_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "turbo_eval"],
        cwd=folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    return first, [line.strip().split("  ")[0] for line in lines if line.startswith("  ")]


def test_a_newcomer_sees_three_commands_for_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    init = [sys.executable, "-m", "turbo_eval", "init", str(demo)]
    subprocess.run(init, check=True, capture_output=True, timeout=60)
    state, commands = greeted(monkeypatch, demo)
    assert state.startswith("Nothing is built") and commands[1] == "turbo-eval build cpu"
    tool = demo / "turbo-eval" / "build" / "cpu" / "bin" / "llama-perplexity"
    tool.parent.mkdir(parents=True)
    tool.touch()
    state, commands = greeted(monkeypatch, demo)
    assert "nothing is measured" in state and commands[0] == "turbo-eval sweep turbo-eval/gates.toml"
    record = make_record("q8_0:turbo3", model="smollm2-135m")
    Store(demo / "turbo-eval" / "results", record.machine).write(record)
    state, commands = greeted(monkeypatch, demo)
    assert "smollm2-135m" in state and commands[1].startswith("turbo-eval recommend smollm2-135m")
    assert len(commands) == 3


def test_the_end_of_a_sweep_on_a_terminal_is_the_front() -> None:
    rows = summarize(
        [
            make_record(ppl=10.0, kld=make_kld(1e-6, 100.0)),
            make_record("q8_0:q8_0", 10.02, kld=make_kld(0.004)),
            make_record("q4_0:q4_0", 10.4, kld=make_kld(0.04)),
            make_record("q5_1:q5_1", 10.4, kld=make_kld(0.05)),
            make_record("turbo3:turbo3", 3556.0, kld=make_kld(2.5)),
        ]
    )
    found = front(rows)
    assert found is not None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(bars(found))
    text = console.export_text()
    names = ("q8_0/q8_0", "q4_0/q4_0", "q5_1")
    lines = {name: line for line in text.splitlines() for name in names if name in line}
    assert lines["q8_0/q8_0"].startswith("●") and not lines["q5_1"].startswith("●")
    assert lines["q5_1"].count("█") > lines["q4_0/q4_0"].count("█") > lines["q8_0/q8_0"].count("█") > 0
    assert "0.0400" in lines["q4_0/q4_0"] and "more than doubled: turbo3/turbo3" in text
