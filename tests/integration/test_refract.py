"""REFRACT (refract-llm on the package index), a KV-cache scorer by others, runs on our build as it comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import absent
from turbo_eval.errors import TurboEvalError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build

pytestmark = [pytest.mark.build, pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def refract(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Path:
    """Its command, in a virtual environment of its own."""
    try:
        for name in ("llama-cli", "llama-tokenize", "llama-completion", "llama-perplexity"):
            build.tool(name)
    except TurboEvalError as error:
        absent(error)
    venv = tmp_path_factory.mktemp("refract") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    install = [str(venv / "bin" / "pip"), "install", "--quiet", "refract-llm==0.3.2.3"]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return venv / "bin" / "refract"


def score(
    refract: Path, build: Build, model: ModelFile, text: Path, pair: str, out: Path
) -> dict[str, float]:
    """Its axes A (greedy text) and B (KL divergence), 0 to 100."""
    prompts = out.with_suffix(".jsonl")
    prompts.write_text(
        "".join(
            json.dumps({"id": f"p{i}", "prompt": prompt, "category": "x"}) + "\n"
            for i, prompt in enumerate(("Say hello.", "Name a colour.", "Count to three."))
        )
    )
    k, v = pair.split(":")
    argv = [str(refract), "score", "--model", str(model.path), "--candidate", f"ctk={k},ctv={v}"]
    argv += [
        "--prompts",
        str(prompts),
        "--corpus",
        str(text),
        "--chunks",
        "1",
        "-ngl",
        "0",
        "--n-predict",
        "12",
    ]
    argv += ["--axis-a", "gtm", "--no-auto-fetch", "--no-progress", "--json-out", str(out)]
    env = os.environ | {
        "LLAMA_CPP_BIN_DIR": str(build.bin_dir),
        "REFRACT_LLAMA_EXTRA_FLAGS": "-t 1",  # busy machines stay quick
        "HOME": str(out.parent),
    }
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=800)
    assert out.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    axes = json.loads(out.read_text())["axes"]
    return {name: float(axis["score"]) for name, axis in axes.items() if axis and "score" in axis}


def test_scores_a_cache_as_it_is(
    refract: Path, build: Build, smollm: ModelFile, prose: CorpusFile, tmp_path: Path
) -> None:
    same = score(refract, build, smollm, prose.path, "f16:f16", tmp_path / "f16.json")
    turbo = score(refract, build, smollm, prose.path, "turbo3:turbo3", tmp_path / "turbo3.json")
    assert same and set(same) == set(turbo)
    assert all(value > 99 for value in same.values()), same
    assert all(0 < value <= 100 for value in turbo.values()), turbo
    assert min(turbo.values()) < min(same.values())
