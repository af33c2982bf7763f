"""position, and gate and recommend until it is decided: on real figures of a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import Cli, one_sentence
from tests.support.layouts import LAYOUTS, write_model
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.llama.build import Build

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(LAYOUTS["qwen2"], tmp_path_factory.mktemp("model") / "small.gguf")


@pytest.fixture(scope="module")
def text(prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(prose.path.read_bytes()[:720] * 6)
    return path


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "turbo_eval", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=600)


def test_position(build: Build, model: Path, text: Path, tmp_path: Path) -> None:
    cli, out = Cli(tmp_path / "results", build.bin_dir), tmp_path / "position.svg"
    args = ("--model", model, "--corpus", text, "--pairs", "q8_0:q8_0,turbo3:turbo3", "--metrics", "kld")
    assert cli.sweep(*args, "--recent", "0", "--ctx", "64,128", "--chunks", "4").returncode == 0
    done = run("position", cli.results, "--spans", "3", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    records = [json.loads(path.read_text()) for path in cli.results.glob("*/*.json")]
    known = {
        (f"{r['cell']['k']}/{r['cell']['v']}", r["cell"]["ctx"]): r["kld"]["mean"]
        for r in records
        if r["kld"]
    }
    assert {(one["cache"], one["ctx"]) for one in told} == known.keys() - {("f16/f16", 64), ("f16/f16", 128)}
    for one in told:
        assert one["kld"][0] == pytest.approx(known[one["cache"], one["ctx"]], rel=1e-5)
        spans = one["spans"]
        assert spans[0]["first"] == one["ctx"] // 2 + 1 and spans[-1]["last"] == one["ctx"] - 1
        weights = [s["last"] - s["first"] + 1 for s in spans]
        mean = sum(w * s["kld"][0] for w, s in zip(weights, spans, strict=True)) / sum(weights)
        assert mean == pytest.approx(one["kld"][0], rel=1e-5)
    assert "<svg" in out.read_text()
    assert "4 × 64 tokens: KLD 0." in run("position", cli.results).stdout
    none = run("position", cli.results, "--metric", "trajectory")
    assert none.returncode == 3 and one_sentence(none.stderr) and "--metrics trajectory" in none.stderr


GATE = """
[sweep]
model = "{model}"
corpus = "{text}"
pairs = ["q8_0:q8_0", "turbo3:turbo3"]
recent = 0
ctx = 64
chunks = 4
metrics = ["kld"]
[[check]]
pair = "q8_0:q8_0"
equivalent_within = 2
[[check]]
pair = "turbo3:turbo3"
not_worse_than = 0.0001
max_kld = 5
"""


def test_gate_until_decided(build: Build, model: Path, text: Path, tmp_path: Path) -> None:
    """Chunks are added to the pairs that its tests leave open; verdicts are read from the longer records."""
    config, results = tmp_path / "gate.toml", tmp_path / "results"
    config.write_text(GATE.format(model=model, text=text))
    args = ("gate", config, "--bin-dir", build.bin_dir, "--results", results)
    assert Cli(results, build.bin_dir).sweep(config).returncode == 0
    plain = run(*args)
    assert plain.returncode == 3 and "more chunks would tell" in plain.stderr
    done = run(*args, "--until-decided", "--max-chunks", "32")
    records = [json.loads(path.read_text()) for path in results.glob("*/*.kld.*.json")]
    chunks = {k: max(r["cell"]["chunks"] for r in records if r["cell"]["k"] == k) for k in ("q8_0", "turbo3")}
    assert chunks["turbo3"] == 32 and "q8_0:q8_0: ΔPPL" in done.stdout, done.stderr
    assert "is equivalent within 2 %, error rate 5 %" in done.stdout
    assert "KL divergence" in done.stdout, "bounds are judged on what the config measures"
    assert done.returncode == 3 and "not decided whether it is not worse than" in done.stderr
    looked = [r for r in records if r["cell"]["k"] == "turbo3"]
    assert all(r["by_chunk"]["sequential"] for r in looked)


def test_recommend_until_decided(build: Build, model: Path, text: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    args = (
        "recommend",
        model,
        "--corpus",
        text,
        "--text-ctx",
        "64",
        "--chunks",
        "4",
        "--recent",
        "0",
        "--threads",
        "1",
    )
    more = ("--bin-dir", build.bin_dir, "--results", results, "--until-decided", "--max-chunks", "8")
    done = run(*args, *more, "--max-delta-ppl", "0.05%", "--json")
    assert done.returncode in (0, 1, 3), done.stderr
    told = json.loads(done.stdout)
    assert max(c["chunks"] for c in told["candidates"]) > 4, "something was open after four chunks"
    best = told["recommended"]
    cheaper = [c for c in told["candidates"] if best is None or c["memory_mib"] < best["memory_mib"]]
    assert all(c["within"] is False or c["chunks"] == 8 for c in cheaper), "nothing cheaper was left open"
    refused = run(*args, *more, "--no-measure")
    assert refused.returncode == 2 and one_sentence(refused.stderr)
