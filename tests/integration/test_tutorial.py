"""Start, run as it is written: each command of the page in its order, in the clone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.util import paths

DEMO = "make demo"
CHOOSE = "turbo-eval recommend smollm2-135m --max-delta-ppl 3% --no-measure"
SERVE = "turbo-eval serve smollm2-135m --max-kld 0.05"
ASK = (
    "curl -s http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d"
    """ '{"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 40}'"""
)
PLAN = "turbo-eval plan --model ~/models/mine.gguf"
OWN = "turbo-eval sweep --model ~/models/mine.gguf"
CHOOSE_OWN = "turbo-eval recommend ~/models/mine.gguf --max-delta-ppl 2%"
SERVE_OWN = "turbo-eval serve ~/models/mine.gguf --max-delta-ppl 2%"
RUN = {DEMO, CHOOSE, SERVE, ASK, PLAN, OWN, CHOOSE_OWN, SERVE_OWN}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm: ModelFile) -> Path:
    """A reader's home folder, with a model in it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").mkdir()
    (folder / "models" / "mine.gguf").symlink_to(smollm.path)
    return folder


def environment(home: Path) -> dict[str, str]:
    """The reader's: with .venv/bin in front, what is downloaded here, records of their own."""
    own = {"HOME": str(home), "TURBO_EVAL_RESULTS": str(home / "results"), "COLUMNS": "140"}
    own |= {"PATH": f"{paths.repo_root() / '.venv' / 'bin'}:{os.environ['PATH']}"}
    return os.environ | {"TURBO_EVAL_CACHE": str(paths.cache_dir())} | own


def told(command: str, home: Path) -> str:
    """What a command of the page prints; fails the test where the command fails."""
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=paths.repo_root(),
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


@contextmanager
def served(command: str, home: Path) -> Iterator[str]:
    """A serve command that runs until the block ends; yields what it said up to "serving"."""
    process = subprocess.Popen(
        ["bash", "-euc", f"exec {command}"],
        cwd=paths.repo_root(),
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
    )
    said, deadline = "", time.monotonic() + 300
    try:
        assert process.stdout is not None
        while "serving" not in said and time.monotonic() < deadline:
            line = process.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        yield said
    finally:
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in the background
        process.wait(60)


def test_from_a_clone_to_a_table_and_a_choice(build: Build, home: Path) -> None:
    table = told(DEMO, home)
    for pair in ("q8_0    turbo3", "turbo3  turbo3"):
        assert pair in table
    said = told(CHOOSE, home)
    assert said.count("recommended") == 1 and "-ctk turbo3 -ctv turbo3" in said


def test_serve_what_was_chosen(build: Build, home: Path) -> None:
    told(DEMO, home)  # nothing is measured twice
    with served(SERVE, home) as said:
        assert "-ctk turbo3 -ctv turbo3" in said
        answer = json.loads(told(ASK, home))
    assert answer["choices"][0]["message"]["content"].strip()


@pytest.mark.slow
def test_the_reader_s_own_model(build: Build, home: Path) -> None:
    assert "mine" in told(PLAN, home)
    assert "mine" in told(OWN, home)
    assert "recommended" in told(CHOOSE_OWN, home)


@pytest.mark.slow
def test_serve_the_reader_s_own_model(build: Build, home: Path) -> None:
    told(OWN, home)
    with served(SERVE_OWN, home) as said:
        assert "mine.gguf" in said
        assert json.loads(told(ASK, home))["choices"]
