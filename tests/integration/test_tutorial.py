"""Start, run as it is written: each command of the page in its order, in the clone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turbo_eval.analysis import table
from turbo_eval.analysis.summary import summarize
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.records.store import read_all
from turbo_eval.util import paths

PAGE = paths.repo_root() / "docs" / "start" / "index.md"
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


def shown(first: str) -> list[str]:
    """Lines of the page's block of output that begins with that word."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if block.split()[0] == first]
    return list(block.splitlines())


def close(page: str, own: str) -> bool:
    """Are two fields the same? Another processor rounds in another order: a perplexity may be off by
    2 %, and its change by four of its errors."""
    if page == own:
        return True
    try:
        (a, error), (b, _) = (map(float, field.split(" ± ")) for field in (page, own))
    except ValueError:
        return False
    return abs(a - b) <= (max(0.5, 4 * error) if page[0] in "+-" else 0.02 * b)


def test_the_page_shows_what_is_printed(build: Build, home: Path) -> None:
    """Each row of its table but for rounding, and what is recommended up to the figures of this machine."""
    told(DEMO, home)
    _, columns, lines = table.for_people(table.to_frame(summarize(read_all([home / "results"]))))
    header, *rows = (re.split(r" {2,}", line.strip()) for line in shown("K"))
    own = [[line[columns.index(name)] for name in header] for line in lines]
    assert len(rows) == len(own) == 7
    for row, ran in zip(rows, own, strict=True):
        odd = [pair for pair in zip(row, ran, strict=True) if not close(*pair)]
        assert not odd, f"{row[:2]}: {odd}"
    said = told(CHOOSE, home)
    first, *chosen = shown("smollm2-135m,")
    assert re.sub("build [0-9a-f]{12}", "", first) in re.sub("build [0-9a-f]{12}", "", said)
    for line in chosen:
        if line == "[…]":
            continue
        start, model, rest = line.partition(", ΔPPL")[0].partition("-m ~/.cache/turbo-eval/models/")
        assert all(part in said for part in (start.partition("llama-server")[0], rest, model and "-m ")), line


def test_serve_what_was_chosen(build: Build, home: Path) -> None:
    told(DEMO, home)  # nothing is measured twice
    with served(SERVE, home) as said:
        assert "-ctk turbo3 -ctv turbo3" in said and shown("serving")[0] in said
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
