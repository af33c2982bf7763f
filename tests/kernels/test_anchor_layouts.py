"""The K anchor is exact on architectures of every RoPE layout, with sliding windows and several sequences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.divergence import Divergence
from tests.support.layouts import LAYOUTS, SOFTCAP, write_model
from turbo_eval.anchor.calibrate import TOOL, calibrate
from turbo_eval.inputs.corpora import CorpusFile, resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.build import Build

pytestmark = pytest.mark.build

RESOLVED = 2e-6  # of the KL divergence, by the 16-bit logits of its base


@pytest.fixture
def text(prose: CorpusFile, tmp_path: Path) -> Path:
    """Two chunks of 256 bytes, and what llama-perplexity wants beyond them."""
    out = tmp_path / "text"
    out.write_bytes(prose.path.read_bytes()[:2000])
    return out


@pytest.fixture(autouse=True)
def _patched(build: Build) -> None:
    if not (build.bin_dir / TOOL).is_file():
        pytest.skip(f"the build in {build.bin_dir} has no {TOOL}")


def exactly(build: Build, model: Path, text: Path, *args: str) -> Divergence:
    """From an f32 cache: nothing of it is rounded."""
    return Divergence(build, model, text, model.parent, *args, base="f32", chunks=2)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if not layout.qk_norm])
def test_from_the_bias(build: Build, text: Path, tmp_path: Path, name: str) -> None:
    compare = exactly(build, write_model(LAYOUTS[name], tmp_path / "model.gguf"), text)
    exact, state = compare.run("f32", "on")
    assert "-> on (anchor: 4/4 layers, balance: 4/4 layers from weights" in state
    assert abs(exact) <= RESOLVED
    assert compare.run("bf16", "off")[0] > RESOLVED, "a rounded key is seen"
    off, _ = compare.run("q4_0", "off")
    on, state = compare.run("q4_0", "auto")
    assert "auto -> on" in state
    assert on < 0.6 * off > 0.01


@pytest.mark.parametrize("args", [("-b", "256"), ("-b", "512"), ("-b", "512", "--kv-unified")])
def test_one_or_several_sequences(build: Build, text: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    compare = exactly(build, write_model(LAYOUTS["qwen2"], tmp_path / "model.gguf"), text, *args)
    assert abs(compare.run("f32", "on")[0]) <= RESOLVED


def test_from_a_file(build: Build, text: Path, tmp_path: Path) -> None:
    """Gemma 3 normalizes K after its projection: only a measured mean says what is constant."""
    model = write_model(LAYOUTS["gemma3, window, norm of K"], tmp_path / "model.gguf")
    file = tmp_path / "anchor.gguf"
    calibrate(resolve_model(str(model)), resolve_corpus(str(text)), build, file, ctx=256, chunks=2, threads=1)
    exact, state = exactly(build, model, text).run("f32", file)
    assert re.search(r"-> on \(anchor: 4/4 layers, balance: \d/4 layers from file", state)
    assert abs(exact) <= RESOLVED


def test_off_where_a_constant_would_count(build: Build, text: Path, tmp_path: Path) -> None:
    compare = exactly(build, write_model(SOFTCAP, tmp_path / "model.gguf"), text)
    assert compare.run("q4_0", "on")[1] == "kv_anchor: on -> off (attention logit soft-capping)"
