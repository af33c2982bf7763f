"""Trajectories with the real tool: f16 generates, caches are scored along it, and run freely the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_kv_eval import run
from tests.support.harness import Cli
from tests.support.layouts import LAYOUTS, write_model
from turbo_eval.evidence.kv_eval import KvEval, read_kv_eval
from turbo_eval.evidence.tokens import load
from turbo_eval.evidence.trajectory import along
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.llama.build import Build

pytestmark = pytest.mark.build

CTX, PROMPTS = 64, 2
SPECS = ("greedy", "0.8:1", "0.8:2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(LAYOUTS["qwen2"], tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def text(prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(prose.path.read_bytes()[: 10 * CTX])
    return path


def evaluate(build: Build, model: Path, text: Path, *more: str) -> KvEval:
    out = text.with_name("figures.bin")
    specs = [word for spec in SPECS for word in ("--trajectory", spec)]
    pairs = ("--pair", "f16:f16", "--pair", "turbo3:turbo3,recent=0,first=0")
    sizes = ("-c", str(CTX), "-b", str(4 * CTX), "-ub", str(CTX), "--prompts", str(PROMPTS))
    done = run(build, "llama-kv-eval", "-m", model, "-f", text, "--out", out, *sizes, *pairs, *specs, *more)
    assert done.returncode == 0, done.stderr
    return read_kv_eval(out)


def test_f16_generates_and_is_followed(build: Build, model: Path, text: Path) -> None:
    found = evaluate(build, model, text, "--chunks", "3", "--one-token", "1")
    assert found.header.trajectories == SPECS
    texts = [found.figures(0, spec).token for spec in SPECS]
    assert texts[0].shape == (PROMPTS, CTX // 2 - 1)
    assert np.array_equal(found.figures(0, "greedy").top, texts[0]), "it generates what it finds best"
    assert all(np.array_equal(found.figures(0, s).top, t) for s, t in zip(SPECS, texts, strict=True))
    greedy_nll, sampled_nll = (found.figures(0, s).nll.mean() for s in SPECS[:2])
    assert greedy_nll < sampled_nll
    assert not np.array_equal(texts[1], texts[2]) and not np.array_equal(texts[0], texts[1])
    for spec in SPECS:
        same, other = found.figures(1, spec), found.figures(2, spec)
        assert not same.kld.any() and np.array_equal(same.top, found.figures(0, spec).top)
        assert other.kld.mean() > 0
    alone = evaluate(build, model, text, "--chunks", "0")
    for spec in SPECS:  # the batches before do not matter, nor do chunks beside a prompt
        assert np.array_equal(alone.figures(0, spec).token, found.figures(0, spec).token)


def test_a_trajectory_that_is_asked_for_wrongly(build: Build, model: Path, text: Path) -> None:
    for spec in ("0:1", "hot", "0.8", "0.8:x", "-1:3", "nan:1"):
        args = ("-m", model, "-f", text, "-c", str(CTX), "--pair", "f16:f16", "--trajectory", spec)
        done = run(build, "llama-kv-eval", *args)
        assert done.returncode == 1 and "--trajectory" in done.stdout + done.stderr


def test_records_of_a_sweep(build: Build, model: Path, text: Path, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ("--model", model, "--corpus", text, "--ctx", str(CTX), "--metrics", "trajectory")
    done = cli.sweep(*args, "--pairs", "f16:f16,q8_0:q8_0,turbo3:turbo3", "--recent", "0")
    assert done.returncode == 0, done.stderr
    records: dict[str, dict[str, Any]] = {}
    for path in cli.results.glob("*/*.json"):
        record = json.loads(path.read_text())
        records[record["cell"]["k"]] = record
    klds = [records[k]["figures"]["trajectory_kld"] for k in ("f16", "q8_0", "turbo3")]
    assert klds[0] == 0 < klds[1] < klds[2]
    assert records["f16"]["figures"]["trajectory_free_pct"] == 100
    assert "trajectory_first_flip" not in records["f16"]["figures"]
    folder = next(cli.results.iterdir())
    file = records["turbo3"]["tokens"]
    tokens = load(folder / file["file"], file["sha256"])
    assert tokens.nll.shape == (2 * 2, CTX // 2 - 1)
    told = along(tokens, 2)
    assert told.kld.value == pytest.approx(klds[2], rel=1e-6)
