"""What runs against what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.records import make_cell
from turbo_eval.llama.output import PplText, parse_ppl
from turbo_eval.metrics.decode import allowed_pct
from turbo_eval.metrics.judge import judge_numbers, judge_state
from turbo_eval.records.record import Effective

GPU = Effective(
    k="q8_0",
    v="turbo3",
    flash_attn=True,
    ctx=512,
    kv_layers=28,
    kv_devices=("CUDA0",),
    layers_offloaded=29,
    layers=29,
    graph_splits=2,
)


def status(state: Effective, **cell: Any) -> str:
    verdict = judge_state(make_cell("q8_0:turbo3", **{"backend": "cuda", **cell}), state)
    return verdict[0] if verdict else "ok"


def test_a_gpu_run_as_it_should_be() -> None:
    assert status(GPU) == "ok"


@pytest.mark.parametrize(
    "change",
    [
        {"layers_offloaded": None},
        {"layers_offloaded": 20},
        {"kv_devices": ("CUDA0", "CPU")},
        {"graph_splits": 58},
    ],
)
def test_anything_of_attention_on_the_cpu_is_a_fallback(change: dict[str, Any]) -> None:
    assert status(GPU.model_copy(update=change)) == "cpu-fallback"


def test_on_the_cpu_none_of_this_matters() -> None:
    state = GPU.model_copy(update={"layers_offloaded": None, "kv_devices": ("CPU",), "graph_splits": 1})
    assert status(state, backend="cpu") == "ok"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"k": None}, "type-mismatch"),
        ({"v": "q8_0"}, "type-mismatch"),
        ({"k": "q8_0+f16"}, "type-mismatch"),
        ({"flash_attn": False}, "state-mismatch"),
        ({"ctx": 256}, "state-mismatch"),
        ({"config_files": ("/etc/llama.cpp/config.ini",)}, "state-mismatch"),
        ({"anchor": "on (anchor: 3/28 layers)"}, "state-mismatch"),
    ],
)
def test_mismatches(change: dict[str, Any], expected: str) -> None:
    assert status(GPU.model_copy(update=change)) == expected


@pytest.mark.parametrize(
    ("asked", "got", "expected"),
    [
        ("off", "off", "ok"),
        ("off", None, "ok"),
        ("auto", "on (x)", "ok"),
        ("auto", "off (K is not quantized)", "ok"),
        ("on", "on (x)", "ok"),
        ("on", "off (sinks)", "state-mismatch"),
        ("some/file.gguf", None, "state-mismatch"),
    ],
)
def test_anchor_asked_and_effective(asked: str, got: str | None, expected: str) -> None:
    assert status(GPU.model_copy(update={"anchor": got}), anchor=asked) == expected


def numbers(text: str, **cell: Any) -> tuple[str, str]:
    verdict = judge_numbers(make_cell(**cell), text, parse_ppl(text))
    assert verdict is not None
    return verdict


HEAD = "perplexity: calculating perplexity over {n} chunks, n_ctx=512, batch_size=512, n_seq=1\n"


def test_nan_in_one_chunk_names_it() -> None:
    text = HEAD.format(n=4) + "[1]9.1,[2]9.2,[3]nan,[4]nan,\nFinal estimate: PPL = nan +/- nan\n"
    assert numbers(text) == ("nan", "perplexity is nan from chunk 3 on")


def test_infinity_is_no_number_either() -> None:
    assert numbers(HEAD.format(n=4) + "[1]inf,")[0] == "nan"


def test_fewer_chunks_than_asked() -> None:
    text = HEAD.format(n=2) + "[1]9.1,[2]9.2,\nFinal estimate: PPL = 9.2 +/- 0.1\n"
    assert numbers(text) == ("short-corpus", "prose holds 2 of 4 chunks")


def test_a_chunk_that_was_not_printed() -> None:
    text = HEAD.format(n=4) + "[1]9.1,[2]9.2,[4]9.2,\nFinal estimate: PPL = 9.2 +/- 0.1\n"
    assert numbers(text)[0] == "no-result"


def test_no_final_estimate() -> None:
    assert numbers(HEAD.format(n=4) + "[1]9.1,\nggml_backend: out of memory\n") == (
        "no-result",
        "ggml_backend: out of memory",
    )


def test_good_numbers_pass() -> None:
    good = PplText(9.2, 0.1, (9.1, 9.2, 9.3, 9.2), 4, None)
    assert judge_numbers(make_cell(), "", good) is None


def test_what_two_paths_may_differ_by() -> None:
    assert allowed_pct(2, 0.0, 510) == allowed_pct(2, 0.0016, 510) == 2
    assert allowed_pct(2, 0.1044, 510) == pytest.approx(8.96, abs=0.01)
    assert allowed_pct(2, 0.1044, 8 * 510) == pytest.approx(3.08, abs=0.01), "more text, less noise"
