"""The K anchor on real models: exact where nothing is quantized, kept by shift and state, a cure."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.divergence import Divergence, tool
from turbo_eval.anchor.calibrate import TOOL, calibrate
from turbo_eval.anchor.kbias import anchor_phase, mean_phase, read_kbias
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.util.process import child_environment

pytestmark = pytest.mark.build

PROMPT = "The history of the lighthouse begins"


@pytest.fixture(autouse=True)
def _patched(build: Build) -> None:
    if not (build.bin_dir / TOOL).is_file():
        pytest.skip(f"the build in {build.bin_dir} has no {TOOL}")


def exact_weights(build: Build, model: ModelFile, folder: Path, kind: str) -> Path:
    """The model without quantized weights.

    With them llama.cpp's CPU code rounds the activations to 8 bits, and that turns a difference in
    the last bit of a key into a KL divergence of about 0.003: nothing below it can be seen.
    """
    out = folder / f"{model.name}-{kind}.gguf"
    argv = [str(build.tool("llama-quantize")), "--allow-requantize", str(model.path), str(out), kind, "2"]
    subprocess.run(argv, check=True, capture_output=True, env=child_environment()[0], timeout=600)
    return out


@pytest.fixture(scope="module")
def exact_smollm(build: Build, smollm: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_weights(build, smollm, tmp_path_factory.mktemp("exact"), "F32")


@pytest.fixture(scope="module")
def exact_qwen(build: Build, qwen: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_weights(build, qwen, tmp_path_factory.mktemp("exact"), "F32")


@pytest.fixture(scope="module")
def calibration(
    build: Build, smollm: ModelFile, prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Means of K on a model without bias: with it the anchor has something to take out."""
    out = tmp_path_factory.mktemp("calibration") / "smollm.gguf"
    done = calibrate(smollm, prose, build, out, ctx=256, chunks=2, threads=1)
    assert done.tokens == 512
    return out


@pytest.fixture(scope="module")
def text(
    build: Build, exact_smollm: Path, prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory
) -> Divergence:
    return Divergence(build, exact_smollm, prose.path, tmp_path_factory.mktemp("smollm"))


def test_auto_is_off_without_a_quantized_k(text: Divergence) -> None:
    kld, state = text.run("f16", "auto")
    assert state == "kv_anchor: auto -> off (K is not quantized)"
    assert abs(kld) <= 2e-6  # what the tool resolves


def test_exact_on_a_model_without_bias(text: Divergence) -> None:
    kld, state = text.run("f16", "on")
    assert state.startswith("kv_anchor: on -> on (anchor: 0/30 layers, balance: 30/30 layers from weights")
    assert abs(kld) < 1e-5


def test_exact_with_a_calibration_file(text: Divergence, calibration: Path) -> None:
    kld, state = text.run("f16", calibration)
    assert re.search(r"-> on \(anchor: 30/30 layers, balance: \d+/30 layers from file", state)
    assert abs(kld) < 1e-5


def test_the_check_of_exactness_can_fail(text: Divergence) -> None:
    kld, _ = text.run("bf16", "off")
    assert kld > 1e-5


def test_calibration_file_says_where_it_comes_from(
    calibration: Path, smollm: ModelFile, prose: CorpusFile
) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(calibration)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["kv_anchor.model.sha256"] == smollm.sha256
    assert said["kv_anchor.corpus.sha256"] == prose.sha256
    values = {t.name: np.asarray(t.data, dtype=np.float64) for t in reader.tensors}
    assert len(values) == 3 * smollm.gguf.n_layer
    assert all(np.isfinite(v).all() for v in values.values())
    assert (values["blk.3.k_std"] > 0).all()
    assert calibration.stat().st_size < 64 * 1024


def test_a_file_for_another_model_is_refused(build: Build, qwen: ModelFile, calibration: Path) -> None:
    args = ["-p", PROMPT, "-n", "1", "-c", "256", "-no-cnv", "-ctk", "q8_0", "--kv-anchor", calibration]
    said = tool(build, "llama-completion", "-m", qwen.path, *args, ok=False)
    assert "was made for another model" in said


def generate(build: Build, model: Path, *args: object, ok: bool = True) -> str:
    """The text of greedy generation, and errors."""
    base = ["-m", model, "-p", PROMPT, "-no-cnv", "-fa", "on", "--temp", "0", "--no-warmup", "--seed", "1"]
    return tool(build, "llama-completion", *base, *args, ok=ok, verbosity=1)


SHIFT = ["-c", "256", "-n", "280", "--context-shift", "--ignore-eos", "-ctk", "f16", "-ctv", "f16"]


def test_context_shift_gives_the_same_text(build: Build, exact_smollm: Path, calibration: Path) -> None:
    off = generate(build, exact_smollm, *SHIFT, "--kv-anchor", "off")
    assert len(off.split()) > 150  # it went past the 256 tokens of the context
    assert generate(build, exact_smollm, *SHIFT, "--kv-anchor", calibration) == off


def test_context_shift_on_a_model_with_bias(build: Build, exact_qwen: Path) -> None:
    off = generate(build, exact_qwen, *SHIFT, "--kv-anchor", "off")
    assert generate(build, exact_qwen, *SHIFT, "--kv-anchor", "on") == off


def test_state_survives_saving_and_another_anchor_is_refused(
    build: Build, smollm: ModelFile, calibration: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.bin"
    args = ["-c", "256", "-n", "24", "-ctk", "q4_0", "-ctv", "q4_0", "--prompt-cache", state]
    fresh = generate(build, smollm.path, *args, "--kv-anchor", calibration)
    assert state.is_file()
    assert generate(build, smollm.path, *args, "--kv-anchor", calibration) == fresh
    refused = generate(build, smollm.path, *args, "--kv-anchor", "off", ok=False)
    assert (
        "the state was saved with the K anchor on, this context has it off: use the same --kv-anchor"
        in refused
    )


def test_exact_on_a_model_with_bias(
    build: Build, exact_qwen: Path, prose: CorpusFile, tmp_path: Path
) -> None:
    kld, state = Divergence(build, exact_qwen, prose.path, tmp_path).run("f16", "on")
    assert "anchor: 24/24 layers, balance: 24/24 layers" in state
    assert abs(kld) < 1e-5


def test_off_is_the_catastrophe_and_auto_the_cure(
    build: Build, qwen: ModelFile, prose: CorpusFile, tmp_path: Path
) -> None:
    both = Divergence(build, qwen.path, prose.path, tmp_path)
    off, _ = both.run("q4_0", "off")
    on, state = both.run("q4_0", "auto")
    assert "-> on" in state
    assert off > 0.5
    assert on < 0.1


def test_phases() -> None:
    theta = np.array([1.0, 0.01, 1e-4])
    positions = np.arange(512)
    for got, angle in zip(mean_phase(theta, 512), theta, strict=True):
        assert got == pytest.approx(np.exp(1j * angle * positions).mean(), abs=1e-12)
    lengths = [8192, 4096, 2048, 1024, 512, 256]
    assert anchor_phase(theta) == pytest.approx(np.mean([mean_phase(theta, n) for n in lengths], axis=0))


def test_bias_is_read_by_pair(qwen: ModelFile) -> None:
    bias = read_kbias(qwen.path)
    assert bias.pairs.shape == (24, 2, 32)
    assert bias.theta[0] == 1.0
    assert bias.largest()[0] > 100  # the layer that drowns a quantizer
    assert 0.5 < bias.slow_share(512)[0] <= 1
