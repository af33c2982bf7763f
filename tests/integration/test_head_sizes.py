"""Heads that blocks of 64 values do not divide are filled up with zeros, and nothing else changes."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.harness import Cli
from tests.support.layouts import LAYOUTS, write_model
from turbo_eval.evidence.kv_eval import KvEval, read_kv_eval
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.llama.build import Build
from turbo_eval.util.process import child_environment

pytestmark = pytest.mark.build

DIMS = (40, 80, 96, 112)
TYPES = ("turbo4", "turbo3", "turbo2")
PAIRS = ("turbo4:turbo4", "turbo3:turbo3", "turbo2:turbo2", "q8_0:turbo3", "f16:turbo4")
EXACT = "turbo4:turbo4,recent=256,first=4,recent-type=f16"


def heads_of(dim: int, folder: Path) -> Path:
    layout = dataclasses.replace(LAYOUTS["llama"], dim=dim, rotary=dim, bias=1.0)
    return write_model(layout, folder / f"heads-of-{dim}.gguf")


def evaluate(build: Build, model: Path, text: Path, *pairs: str) -> KvEval:
    out = model.with_suffix(".bin")
    argv = [build.tool("llama-kv-eval"), "-m", model, "-f", text, "--out", out, "--chunks", "2"]
    argv += ["-c", "256", "-b", "256", "-ub", "64", "--one-token", "1", "-fa", "on", "-t", "1"]
    argv += ["--device", "none", "--no-warmup", "-fit", "off"]
    argv += [word for pair in pairs for word in ("--pair", pair)]
    done = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, env=child_environment()[0], timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return read_kv_eval(out)


@pytest.fixture(scope="module")
def text(prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(prose.path.read_bytes()[:1500])
    return path


@pytest.fixture(scope="module")
def whole(build: Build, text: Path) -> dict[str, float]:
    """Mean KL divergence by pair where 64 divides the heads."""
    return klds(evaluate(build, heads_of(64, text.parent), text, *(f"{p},recent=0,first=0" for p in PAIRS)))


def klds(found: KvEval) -> dict[str, float]:
    return {pair: float(found.figures(i + 1).kld.mean()) for i, pair in enumerate(PAIRS)}


@pytest.mark.parametrize("dim", DIMS)
def test_filled_heads_lose_no_more_than_whole_ones(
    build: Build, text: Path, tmp_path: Path, whole: dict[str, float], dim: int
) -> None:
    plain = [f"{p},recent=0,first=0" for p in PAIRS]
    found = evaluate(build, heads_of(dim, tmp_path), text, *plain, EXACT)
    assert all(run.status == "ok" for run in found.runs)
    for pair, kld in klds(found).items():
        assert kld < 1.6 * whole[pair], pair
    exact = found.figures(len(PAIRS) + 1)
    assert exact.kld.mean() < 1e-5, "a window over the whole text is the text"
    for i in range(len(PAIRS)):
        one, many = found.figures(i + 1, "one-token"), found.figures(i + 1)
        assert np.abs(one.nll - many.nll[:1]).mean() < 0.6 * np.abs(many.nll - found.figures(0).nll).mean()


@pytest.mark.parametrize("dim", [80, 96])
@pytest.mark.parametrize("pair", [("turbo3", "turbo3"), ("q8_0", "turbo4")], ids="/".join)
def test_states_and_shifts(build: Build, text: Path, tmp_path: Path, dim: int, pair: tuple[str, str]) -> None:
    short = tmp_path / "short"
    short.write_bytes(text.read_bytes()[:560])
    model, state = heads_of(dim, tmp_path), tmp_path / "state"
    types = (f"k={pair[0]}", f"v={pair[1]}", "recent=0", "first=0")

    def run(*args: object) -> str:
        argv = [str(build.tool("test-kv-session")), str(model), str(short), *map(str, args)]
        done = subprocess.run(
            argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=child_environment()[0]
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    saved = run("save", state, *types, "ctx=1024", "seqs=2")
    assert len(saved.split()) == 16
    assert run("load", state, *types, "ctx=2048", "seqs=4") == saved
    assert run("load", state, "k=f16", "v=f16", "ctx=1024", "seqs=2").startswith("refused: ")
    still, shifted = (float(run("shift", n, *types)) for n in (0, 4))
    assert shifted == pytest.approx(still, rel=0.03)


def test_records_say_the_bits_that_are_stored(build: Build, text: Path, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    model = heads_of(96, tmp_path)
    pairs = "f16:f16,turbo3:turbo3,q4_0:q4_0"
    args = ("--model", model, "--corpus", text, "--ctx", "128", "--chunks", "2", "--recent", "0")
    done = cli.sweep(*args, "--pairs", pairs)
    assert done.returncode == 0, done.stderr
    for record in cli.records():
        filled = 128 / 96 if record["cell"]["k"] == "turbo3" else 1.0
        bits = {"f16": 16.0, "turbo3": 3.25, "q4_0": 4.5}[record["cell"]["k"]] * filled
        values = 2 * 4 * 2 * 96 * record["effective"]["ctx"]
        assert record["effective"]["kv_mib"] * 2**23 == pytest.approx(values * bits, rel=0.02)
        if record["cell"]["k"] == "turbo3":
            assert record["effective"]["k_bits"] == pytest.approx(bits, abs=0.01)
            assert record["effective"]["v_bits"] == pytest.approx(bits, abs=0.01)


def test_smaller_blocks_are_refused_by_name(build: Build, text: Path, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ("--model", heads_of(80, tmp_path), "--corpus", text, "--ctx", "128", "--chunks", "2")
    done = cli.sweep(*args, "--pairs", "q8_0:q8_0")
    assert done.returncode == 2
    assert "q8_0 works on blocks of 32 values, which do not divide head_dim 80 of K" in done.stderr
