"""Fixtures that several test modules share: real binaries, a real model, real text."""

from __future__ import annotations

import os
import subprocess
import sys
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
    """Skip where a person has not built or downloaded yet; fail in CI, which must not pass by skipping."""
    if os.environ.get("CI"):
        pytest.fail(error.sentence())
    pytest.skip(error.sentence())


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
