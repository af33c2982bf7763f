"""probe names the layer and the tensor of faults put into the real libraries, and of Qwen's K bias."""

from __future__ import annotations

import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from turbo_eval.errors import UsageError
from turbo_eval.formats.codec import reference
from turbo_eval.formats.window import OFF, Window
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.probe import Setup, compare, render, take
from turbo_eval.probe.dump import TOOL, Dump
from turbo_eval.probe.steps import rotate
from turbo_eval.util import paths

TOKENS = 32
GOOD = "k=turbo4,v=turbo3"

# One thread, so that a call is a whole operation. The rotation runs Q, V, K and output in each layer.
FAULTS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "ggml.h"

static int is(const char * fault) {
    return !strcmp(getenv("FAULT"), fault);
}

void ggml_compute_forward_set_rows(const void * params, struct ggml_tensor * dst) {
    void (*real)(const void *, struct ggml_tensor *) = dlsym(RTLD_NEXT, __func__);
    real(params, dst);
    const int64_t rows = dst->src[0]->ne[1];
    for (int64_t row = 0; row < rows; ++row) {
        uint8_t * x = (uint8_t *) dst->data + row * dst->nb[1];
        if (is("k-scale") && !strcmp(dst->view_src->name, "cache_k_l5")) {
            for (size_t block = 0; block < dst->nb[1]; block += 34) {
                x[block] += 16; // twice the scale
                x[block + 1] += 16;
            }
        }
        if (is("v-codes") && !strcmp(dst->view_src->name, "cache_v_l7")) {
            for (int i = 2; i < 18; ++i) {
                x[26 + i] ^= 0x55; // head 1
            }
        }
    }
}

void ggml_compute_forward_fwht(const void * params, struct ggml_tensor * dst) {
    static int calls = 0;
    void (*real)(const void *, struct ggml_tensor *) = dlsym(RTLD_NEXT, __func__);
    const int call = calls++;
    if (is("rotation") && call == 4 * 3 + 2) {
        memcpy(dst->data, dst->src[1]->data, ggml_nbytes(dst));
        return;
    }
    real(params, dst);
}

void ggml_compute_forward_flash_attn_ext(const void * params, struct ggml_tensor * dst) {
    void (*real)(const void *, struct ggml_tensor *) = dlsym(RTLD_NEXT, __func__);
    real(params, dst);
    if (is("kernel") && !strcmp(dst->src[1]->view_src->name, "cache_k_l2")) {
        for (int64_t token = 0; token < dst->ne[2]; ++token) {
            memset((char *) dst->data + token * dst->nb[2] + 4 * dst->nb[1], 0, dst->nb[1]); // head 4
        }
    }
}
"""


@pytest.fixture(scope="module")
def probing_build(build: Build) -> Build:
    if not (build.bin_dir / TOOL).is_file() or "turbo4" not in capabilities(build).cache_types:
        pytest.skip(f"the build has no {TOOL} or no turbo types")
    return build


class Prober:
    def __init__(self, build: Build, model: ModelFile, text: CorpusFile, folder: Path) -> None:
        self.build, self.model, self.text, self.folder = build, model, text, folder

    @cached_property
    def clean(self) -> Dump:
        return self.dump(GOOD)

    def dump(self, setup: str) -> Dump:
        return take(
            Setup.parse(f"{setup},bin={self.build.bin_dir}"),
            model=self.model.path,
            text=self.text.path,
            tokens=TOKENS,
            threads=1,
            folder=self.folder,
            name="side",
        )


@pytest.fixture(scope="module")
def prober(
    probing_build: Build, smollm: ModelFile, prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory
) -> Prober:
    return Prober(probing_build, smollm, prose, tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def faults(probing_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("puts the faults in with LD_PRELOAD")
    headers = [p / "ggml" / "include" for p in (probing_build.bin_dir.parent.parent, paths.worktree_dir())]
    found = next((place for place in headers if (place / "ggml.h").is_file()), None)
    if found is None:
        pytest.skip("ggml's headers are not here")
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.c").write_text(FAULTS)
    command = ["cc", "-O1", "-shared", "-fPIC", f"-I{found}", str(folder / "faults.c"), "-o"]
    subprocess.run([*command, str(folder / "faults.so"), "-ldl"], check=True)
    return folder / "faults.so"


def test_rotation_is_the_hadamard_matrix() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 128)).astype(np.float32)
    matrix = np.ones((1, 1))
    while len(matrix) < 64:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    assert np.allclose(rotate(x, 64), (x.reshape(-1, 64) @ matrix / 8).reshape(x.shape))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("turbo4", 0.0055, 0.0062), ("turbo3", 0.024, 0.027), ("q8_0", 1e-5, 5e-5)]
)
def test_reference_error_is_the_types(name: str, low: float, high: float) -> None:
    x = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    values = reference(name, x)
    assert values is not None
    assert low < ((values - x) ** 2).mean() < high


def test_setup_refuses_what_it_does_not_know() -> None:
    setup = Setup.parse("backend=cuda,k=turbo4,env.GGML_X=1,anchor=off")
    assert (setup.backend, setup.k, setup.v, setup.env, setup.anchor) == (
        *("cuda", "turbo4", "f16"),
        *({"GGML_X": "1"}, "off"),
    )
    assert not setup.window
    assert Setup.parse("k=turbo4,v=turbo4,recent=32").window == Window(32, 4)
    assert Setup.parse("k=q8_0,v=q8_0,recent=32").window == OFF
    for bad in ("key=turbo4", "k", "backend=opencl", "v=turbo5", "k=turbo4,recent=-1", "first=x"):
        with pytest.raises(UsageError):
            Setup.parse(bad)


@pytest.mark.build
def test_beside_a_window_less_is_lost_and_nothing_is_blamed(prober: Prober) -> None:
    """Attention over keys that the dump does not hold is not judged; writes, cache and logits are."""
    alone, beside = (prober.dump(f"k=turbo3,v=turbo3,recent={recent}") for recent in (0, 32))
    exact = prober.dump("k=f16,v=f16")
    assert all(layer.plain for layer in alone.layers.values())
    assert not any(layer.plain for layer in beside.layers.values())
    result = compare(exact, beside)
    assert not result.faulty and result.kld < 0.5 * compare(exact, alone).kld


@pytest.mark.build
def test_a_sound_build_has_no_finding(prober: Prober, tmp_path: Path) -> None:
    exact = prober.dump("k=f16,v=f16")
    result = compare(exact, prober.clean)
    assert not result.faulty
    assert len(result.differences) == prober.model.gguf.n_layer
    assert result.differences[0].k == 0, "the first layer's K is made before any cache is read"
    assert 0.001 < result.kld < 0.5
    for judged in result.judged_b:
        assert judged.k_noise == pytest.approx(judged.k_reference, rel=0.02)
        assert 0.004 < judged.k_noise < 0.008
        assert 0.02 < judged.v_noise < 0.03
    assert "Every step follows" in render.render_markdown(result)
    render.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    again = compare(prober.clean, prober.dump(GOOD))
    assert "All cache bytes are the same on both sides." in render.conclusion(again)


@pytest.mark.build
@pytest.mark.parametrize(
    ("fault", "layer", "tensor", "words"),
    [
        ("k-scale", 5, "K cache", "they are 2 times what was written: a wrong scale"),
        ("v-codes", 7, "V cache", "KV head 1: the cached values are off"),
        ("rotation", 3, "K rotation", "was skipped (groups of 64)"),
        ("kernel", 2, "attention output", "head 4: NMSE"),
    ],
)
def test_a_fault_is_named(
    prober: Prober, faults: Path, fault: str, layer: int, tensor: str, words: str
) -> None:
    result = compare(prober.clean, prober.dump(f"{GOOD},env.LD_PRELOAD={faults},env.FAULT={fault}"))
    assert result.findings_a == ()
    found = [(f.layer, f.tensor) for f in result.findings_b if not f.costly]
    assert found == [(layer, tensor)], "this one, and nothing that follows from it"
    assert words in result.findings_b[0].detail


@pytest.mark.build
def test_qwens_k_bias_is_seen_at_layer_0(
    probing_build: Build, qwen: ModelFile, prose: CorpusFile, tmp_path: Path
) -> None:
    anchored = capabilities(probing_build).kv_anchor
    prober = Prober(probing_build, qwen, prose, tmp_path)
    off = prober.dump("k=turbo4,v=f16" + (",anchor=off" if anchored else ""))
    result = compare(prober.dump("k=f16,v=f16"), off)
    assert result.findings_a == ()
    first = result.findings_b[0]
    assert (first.layer, first.tensor, first.costly) == (0, "K", True)
    assert "of K's power is the same in every token" in first.detail
