"""The parser on real logs, and on the lines that only other backends print."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.records import make_cell
from turbo_eval.llama import output
from turbo_eval.metrics.judge import judge_state

LOGS = Path(__file__).parents[1] / "data" / "logs"


def log(name: str) -> str:
    return (LOGS / f"{name}.log").read_text()


def test_perplexity_log() -> None:
    found = output.parse_ppl(log("base"))
    assert (found.ppl, found.ppl_err) == (23.0000, 6.61646)
    assert found.running == (10.2860, 23.0000)
    assert found.chunks == 2
    assert found.kld is None


def test_effective_state() -> None:
    state = output.parse_effective(log("kld"))
    assert (state.k, state.v) == ("q4_0", "q4_0")
    assert (state.kv_mib, state.k_mib, state.v_mib) == (1.58, 0.79, 0.79)
    assert (state.kv_layers, state.graph_splits, state.ubatch) == (30, 1, 128)
    assert state.kv_devices == ("CPU",)
    assert state.flash_attn is True
    assert (state.rot_k, state.rot_v) == (True, True)
    assert state.anchor is None


def test_kl_log() -> None:
    found = output.parse_ppl(log("kld"))
    assert (found.ppl, found.ppl_err) == (24.146011, 6.895837)
    assert found.running == (11.0062, 24.1460)
    kld = found.kld
    assert kld is not None
    assert (kld.mean, kld.mean_err, kld.median) == (0.041224, 0.005661, 0.020940)
    assert (kld.p90, kld.p99, kld.p999, kld.max) == (0.093171, 0.295357, 0.426191, 0.444483)
    assert (kld.same_top_pct, kld.rms_dp_pct) == (85.714, 4.693)
    assert (kld.ratio, kld.ratio_err) == (1.049822, 0.028279)
    assert kld.ppl_base == 23.000102


def test_kl_statistics_cut_off_are_no_statistics() -> None:
    assert output.parse_kld(log("kld").split("RMS Δp    ")[0]) is None


def test_short_corpus_is_seen() -> None:
    assert output.corpus_tokens_if_short(log("short")) == 26
    assert output.parse_ppl(log("short")).ppl is None


def test_refused_type() -> None:
    assert output.refusal(log("badtype")) == "Unsupported cache type: turbo3"


def test_cuda_log() -> None:
    """turbo3/turbo3 on one H100."""
    text = log("cuda")
    state = output.parse_effective(text)
    assert (state.k, state.v, state.kv_devices) == ("turbo3", "turbo3", ("CUDA0",))
    assert (state.kv_mib, state.k_mib, state.v_mib, state.kv_layers) == (9.14, 4.57, 4.57, 30)
    assert (state.layers_offloaded, state.layers, state.graph_splits) == (31, 31, 2)
    assert state.devices == ("CUDA0 (NVIDIA H100 80GB HBM3)",)
    assert (state.flash_attn, state.rot_k, state.rot_v) == (True, True, True)
    assert output.parse_ppl(text).running == (14.9479, 25.2945)
    assert judge_state(make_cell("turbo3:turbo3", backend="cuda", anchor="auto"), state) is None


def test_attention_that_cuda_left_to_the_cpu() -> None:
    """Unpatched llama.cpp on the same card: it prints a perplexity and says nothing of the detour."""
    text = log("cuda-fallback")
    state = output.parse_effective(text)
    assert (state.layers_offloaded, state.layers, state.kv_devices) == (31, 31, ("CUDA0",))
    assert (state.graph_splits, state.kv_layers) == (62, 30)
    verdict = judge_state(make_cell("iq4_nl:iq4_nl", backend="cuda"), state)
    assert verdict is not None and verdict[0] == "cpu-fallback"
    assert output.parse_ppl(text).ppl == 22.1361


def test_pair_without_a_kernel() -> None:
    said = output.refusal(log("cuda-refused"))
    assert said is not None
    assert said.startswith(
        "CUDA0 has no Flash Attention kernel for a KV cache with K type iq4_nl and V type turbo3"
        " and head size 64 (layer 0): "
    )


def test_nan_is_read_as_nan() -> None:
    text = "perplexity: calculating perplexity over 3 chunks, n_ctx=64, x\n[1]9.5,[2]nan,[3]-nan,\n"
    found = output.parse_ppl(text)
    assert found.running[0] == 9.5
    assert math.isnan(found.running[1]) and math.isnan(found.running[2])
    assert found.ppl is None


def test_gpu_lines() -> None:
    # Formats from src/llama-model.cpp and src/llama-context.cpp at the pin.
    state = output.parse_effective(
        "ggml_cuda_init: found 1 CUDA devices:\n"
        "  Device 0: NVIDIA H100 80GB HBM3, compute capability 9.0, VMM: yes\n"
        "ggml_metal_device_init: GPU family: MTLGPUFamilyApple8  (1008)\n"
        "llama_prepare_model_devices: using device CUDA0 (NVIDIA H100 80GB HBM3) (0000:01:00.0)\n"
        "load_tensors: offloaded 29/29 layers to GPU\n"
        "llama_kv_cache:      CUDA0 KV buffer size =     7.00 MiB\n"
        "sched_reserve: graph: nodes = 986, splits = 2 (with bs=512), 58 (with bs=1), input objects = 4\n"
    )
    assert (state.layers_offloaded, state.layers) == (29, 29)
    assert state.kv_devices == ("CUDA0",)
    assert state.graph_splits == 58
    assert state.gpu == (
        "Device 0: NVIDIA H100 80GB HBM3, compute capability 9.0, VMM: yes",
        "GPU family: MTLGPUFamilyApple8  (1008)",
    )
    assert state.devices == ("CUDA0 (NVIDIA H100 80GB HBM3)",)


def test_splits_of_a_graph_that_differs_for_single_tokens() -> None:
    # as with an exact window, whose prompts have operations that a single token does not need
    state = output.parse_effective(
        "sched_reserve: graph: nodes = 936, splits = 2, input objects = 4, input tensors = 6\n"
        "sched_reserve: graph (pp bs=512, tg bs=1): nodes = 1844 / 1544, splits = 87 / 3, "
        "input objects = 4 / 4, input tensors = 9 / 9\n"
    )
    assert state.graph_splits == 87


@pytest.mark.parametrize(
    ("line", "anchor", "bits"),
    [
        ("kv_anchor: off\n", "off", None),
        ("kv_anchor: auto -> off (K is not quantized)\n", "off (K is not quantized)", None),
        (
            "kv_anchor: auto -> on (anchor: 9/28, K types: turbo4 x24 q8_0 x4, 4.857 bits per K value)\n",
            "on (anchor: 9/28, K types: turbo4 x24 q8_0 x4, 4.857 bits per K value)",
            4.857,
        ),
    ],
)
def test_anchor_line(line: str, anchor: str, bits: float | None) -> None:
    state = output.parse_effective("x\n" + line)
    assert (state.anchor, state.k_bits) == (anchor, bits)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(("name", "last"), [("base", 23.0000), ("kld", 24.1460)])
def test_progress_does_not_depend_on_how_the_output_is_cut(name: str, last: float, size: int) -> None:
    scanner, text = output.ProgressScanner(), log(name)
    seen = []
    for start in range(0, len(text), size):
        if scanner.feed(text[start : start + size]):
            seen.append((scanner.chunk, scanner.total))
    assert (scanner.chunk, scanner.total, scanner.ppl) == (2, 2, last)
    if size < 100:
        assert seen == [(0, 2), (1, 2), (2, 2)]
