"""Greedy agreement and needles through llama-cpp-python with our libraries."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import Cli
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.libraries import library

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (`make setup`)"
)

CONFIG = """
pairs = ["q8_0:q8_0"]
metrics = ["greedy", "needle", "retrieval"]
greedy = { prompts = 2, prompt_tokens = 64, tokens = 8 }
needle = { lengths = [192], depths = [0.5] }
retrieval = { lengths = [192], puzzles = 1 }
"""


def test_generation(tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile) -> None:
    config = tmp_path / "g.toml"
    config.write_text(CONFIG)
    cli = Cli(tmp_path / "results", build.bin_dir)
    done = cli.sweep(config, "--json")
    assert done.returncode == 0, done.stderr
    rows = {(r["k"], r["metric"]): r for r in json.loads(done.stdout)}
    assert set(rows) == {(k, m) for k in ("f16", "q8_0") for m in ("greedy", "needle", "retrieval")}, (
        "f16 is added"
    )
    for (k, _), row in rows.items():
        assert (row["effective_k"], row["effective_v"]) == (k, k)
    exact, lossy = rows["f16", "greedy"]["greedy"], rows["q8_0", "greedy"]["greedy"]
    assert exact["agree_pct"] == 100
    assert exact["tokens"] == 16 and len(exact["outputs"]) == 2
    assert 0 <= lossy["agree_pct"] <= 100
    same = [a == b for a, b in zip(exact["outputs"], lossy["outputs"], strict=True)]
    assert lossy["identical_pct"] == 50 * sum(same)
    needle = rows["q8_0", "needle"]["needle"]
    assert needle["probes"] == 1 and needle["hits"] <= needle["f16_hits"]
    assert rows["f16", "needle"]["needle"]["f16_hits"] == 1, "SmolLM2 finds a needle in 192 tokens"
    exact, lossy = rows["f16", "retrieval"], rows["q8_0", "retrieval"]
    assert exact["retrieval_puzzles"] == 4 and exact["retrieval_f16"] == exact["retrieval_kept"] >= 1
    assert lossy["retrieval_f16"] == exact["retrieval_f16"] and 0 < lossy["retrieval_p"] <= 1


def test_the_worker_finds_its_library_on_macos_too(build: Build, tmp_path: Path) -> None:
    """The real ggml-base under the name it has there; `.so` was written into the worker."""
    real = library(build.bin_dir, "ggml-base").resolve()
    (tmp_path / "libggml-base.dylib").symlink_to(real)
    code = (
        "import sys, types\n"
        "from turbo_eval.metrics.generation import worker\n"
        "lib = types.SimpleNamespace(_lib=types.SimpleNamespace(_name=sys.argv[1] + '/libllama.dylib'))\n"
        "sys.modules['llama_cpp'] = types.SimpleNamespace(llama_cpp=lib)\n"
        "sys.platform = 'darwin'\n"
        "print(worker.ggml_type('q8_0'))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr
