"""Fixtures that several test modules share: real binaries, a real model, real text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from turbo_eval.errors import TurboEvalError
from turbo_eval.inputs.corpora import CorpusFile, default_name, resolve_corpus
from turbo_eval.inputs.models import ModelFile, resolve_model
from turbo_eval.llama.build import Build, find_build
from turbo_eval.util import paths


def absent(error: TurboEvalError) -> NoReturn:
    """Skip where a person has not built or downloaded yet; in CI see below."""
    pytest.skip(error.sentence())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that skips itself fails, because .ci/run installs all but a GPU and a Mac."""
    report = yield
    excused = item.get_closest_marker("gpu") or item.get_closest_marker("mac")
    if os.environ.get("CI") and report.skipped and not excused and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.longrepr = f"{reason} (in CI nothing may be skipped but what needs a GPU or a Mac)"
    return report


@pytest.fixture(scope="session")
def build() -> Build:
    """The CPU build, or the one that TURBO_EVAL_TEST_BIN names."""
    foreign = os.environ.get("TURBO_EVAL_TEST_BIN")
    try:
        return Build.from_bin_dir(Path(foreign)) if foreign else find_build("cpu")
    except TurboEvalError as error:
        absent(error)


@pytest.fixture(scope="session")
def smollm() -> ModelFile:
    """SmolLM2-135M, downloaded if it isn't here."""
    try:
        return resolve_model("smollm2-135m")
    except TurboEvalError as error:
        absent(error)


@pytest.fixture(scope="session")
def qwen() -> ModelFile:
    """Qwen2.5-Coder-0.5B, whose K has a large bias: 490 MB, so only CI downloads it by itself."""
    try:
        return resolve_model("qwen2.5-coder-0.5b", download=bool(os.environ.get("CI")))
    except TurboEvalError as error:
        absent(error)


@pytest.fixture(scope="session")
def prose() -> CorpusFile:
    """The default corpus, downloaded if it isn't here."""
    try:
        return resolve_corpus(default_name())
    except TurboEvalError as error:
        absent(error)


@dataclass(frozen=True)
class Installed:
    """A wheel, the sdist it was made from, and a virtual environment that holds the wheel."""

    wheel: Path
    sdist: Path
    python: Path

    @property
    def command(self) -> Path:
        return self.python.parent / "turbo-eval"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """This checkout packed, and installed into an empty virtual environment elsewhere: some minutes."""
    folder = tmp_path_factory.mktemp("installed")
    dist, venv = folder / "dist", folder / "venv"
    pack = [sys.executable, "-m", "build", "--outdir", str(dist), str(paths.shipped())]
    for command in (pack, [sys.executable, "-m", "venv", str(venv)]):
        subprocess.run(command, check=True, capture_output=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    python = venv / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Installed(wheel, sdist, python)
