"""`turbo-eval inspect`: what it says of small models of many shapes, and of files that are broken or odd."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from tests.support.archs import KNOWN, PAGE, render
from tests.support.inside import call
from tests.support.layouts import LAYOUTS, SOFTCAP, Layout, write_model
from turbo_eval.anchor.facts import read_facts
from turbo_eval.anchor.noise import layer_noise
from turbo_eval.formats.cache_types import CACHE_TYPES
from turbo_eval.util import paths

DIM = 64


def said(path: Path, *arguments: str) -> dict[str, Any]:
    code, out, err = call("inspect", path, "--json", *arguments)
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_model_with_a_bias(tmp_path: Path) -> None:
    model = write_model(LAYOUTS["qwen2"], tmp_path / "m.gguf")
    found = said(model, "--ctx", "1024")
    assert found["anchor"] == {"works": True, "why": "K has a bias in 4 of 4 layers"}
    assert found["exact_window"]["works"]
    # 4 layers of 2 KV heads of 64 + 64 values, 4.25 bits each; the window: 144 slots of q8_0
    assert found["types"]["turbo4"] == {"works": True, "why": "", "bytes": 1024 * 4 * 2 * 128 * 34 // 64}
    assert found["exact_window"]["bytes"] == 144 * 4 * 2 * 128 * 34 // 32
    for layer in found["noise"]:
        assert layer["bias"] > 12 and 0.1 < layer["taken"] < 0.9
        assert layer["anchored"] < 0.95 * layer["plain"]


def test_on_the_terminal(tmp_path: Path) -> None:
    model = write_model(LAYOUTS["gemma3, window, norm of K"], tmp_path / "m.gguf")
    code, out, err = call("inspect", model, "--ctx", "2048")
    assert (code, err) == (0, "")
    assert "4 heads, 2 KV heads, head_dim 64, sliding window of 64 in layers the file does not name" in out
    assert "bias in 4 of 4 layers, norm in 4 of 4 layers, RoPE turns 64 of 64 values, base 10000" in out
    assert "yes (no constant to take out of K; the balance evens out the weights of its norm)" in out
    assert "K and V of one sequence of 2048 tokens" in out


def test_noise_of_a_norm_that_is_uneven(tmp_path: Path) -> None:
    """What Qwen3 has: no bias, norms of Q and K; where K's weights are large, Q's are small."""

    def uneven(name: str, factor: float) -> dict[str, np.ndarray[Any, Any]]:
        weight = np.ones(DIM, np.float32)
        weight[5] = weight[5 + DIM // 2] = factor
        return {f"blk.{i}.{name}.weight": weight for i in range(4)}

    even = Layout("qwen3", qk_norm=True, bias=0)
    plain = [noise(write_model(even, tmp_path / "even.gguf"), i) for i in range(4)]
    tensors = {**uneven("attn_k_norm", 30.0), **uneven("attn_q_norm", 1 / 30)}
    model = write_model(Layout("qwen3", bias=0, tensors=lambda: tensors), tmp_path / "uneven.gguf")
    for i in range(4):
        off, on = noise(model, i)
        assert off > 3 * plain[i][0]
        assert on < 1.05 * plain[i][1]


def noise(model: Path, layer: int) -> tuple[float, float]:
    facts = read_facts(model)
    found = layer_noise(facts, facts.layers[layer], 512)
    return found.plain, found.anchored


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (SOFTCAP, "attention logit soft-capping"),
        (
            Layout("deepseek2", tensors=lambda: {"blk.0.attn_kv_a_mqa.weight": np.ones((4, 4), np.float32)}),
            "multi-head latent attention",
        ),
        (Layout("bloom"), "ALiBi"),
        (Layout("gpt2"), "no RoPE"),
    ],
    ids=lambda value: value.arch if isinstance(value, Layout) else "",
)
def test_where_the_anchor_stays_off(tmp_path: Path, layout: Layout, sentence: str) -> None:
    assert said(write_model(layout, tmp_path / "m.gguf"))["anchor"] == {"works": False, "why": sentence}


def test_sinks_are_shifted_on_the_cpu_and_on_metal_only(tmp_path: Path) -> None:
    """The answer hangs on a tensor, not on the architecture's name."""
    sinks = Layout("gpt-oss", tensors=lambda: {"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    found = said(write_model(sinks, tmp_path / "m.gguf"))["anchor"]
    assert found["works"] and "on the CPU and Metal only, since the model has attention sinks" in found["why"]
    assert "sinks" not in said(write_model(Layout("gpt-oss"), tmp_path / "m.gguf"))["anchor"]["why"]


@pytest.mark.parametrize("dim", [80, 96, 112])
def test_head_sizes(tmp_path: Path, dim: int) -> None:
    """64 divides none of them and heads are filled up, 32 only 96, and 16-bit types take all."""
    model = tmp_path / "m.gguf"
    write_toy(model, dim)
    found = said(model)
    for name, bits in (("turbo4", 4.25), ("turbo3", 3.25), ("turbo2", 2.25)):
        why = f"heads of {dim} filled up to 128: {bits * 128 / dim:.2f} bits per value"
        assert (found["types"][name]["works"], found["types"][name]["why"]) == (True, why)
        assert found["types"][name]["bytes"] == pytest.approx(
            found["types"]["f16"]["bytes"] * bits / 16 * 128 / dim, abs=1
        )
    assert found["types"]["q8_0"]["works"] == (dim == 96)
    assert found["types"]["f16"]["works"]
    assert ("as f16" in found["exact_window"]["why"]) == (dim != 96)


def write_toy(path: Path, dim: int) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(2 * dim)
    writer.add_head_count(2)
    for i in range(2):
        for name in ("attn_q", "attn_k"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones((2 * dim, 2 * dim), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def odd_files(folder: Path) -> Iterator[Path]:
    """More than 30: cut short, bytes turned, counts that are absurd."""
    whole = write_model(LAYOUTS["qwen2"], folder / "whole.gguf").read_bytes()
    header = whole.index(b"output.weight") + 200
    count = 0

    def file(data: bytes) -> Path:
        nonlocal count
        count += 1
        path = folder / f"odd-{count}.gguf"
        path.write_bytes(data)
        return path

    for cut in (0, 1, 4, 8, 16, 23, 24, 40, 100, 500, 1000, header // 2, header, len(whole) - 1):
        yield file(whole[:cut])
    rng = np.random.default_rng(7)
    for _ in range(30):
        data = bytearray(whole)
        for at in rng.integers(4, header, 4):
            data[at] = int(rng.integers(256))
        yield file(bytes(data))
    for key, value in (
        ("block_count", 0),
        ("block_count", 2**31),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 3),
        ("attention.key_length", 2**30),
        ("rope.dimension_count", 7),
        ("context_length", 0),
    ):
        mark = f"qwen2.{key}".encode()
        at = whole.index(mark) + len(mark) + 4
        yield file(whole[:at] + struct.pack("<I", value) + whole[at + 4 :])
    yield file(whole.replace(b"qwen2", b"zwenX"))
    yield file(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))


def test_broken_and_odd_files(tmp_path: Path) -> None:
    """A sentence and an exit code for each, in seconds, or an answer. Nothing escapes as an exception."""
    files = list(odd_files(tmp_path))
    assert len(files) >= 30
    answered = 0
    for path in files:
        start = time.process_time()
        code, out, err = call("inspect", path, "--ctx", "4096")
        assert time.process_time() - start < 5
        assert code in (0, 2), (path, code, err)
        assert "Traceback" not in out + err
        assert (out if code == 0 else err).strip()
        answered += code == 0
    assert 0 < answered < len(files)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    code, _, err = call("inspect", tmp_path / "none.gguf")
    assert code == 2 and "there is no model file" in err


def test_the_table_of_the_docs_is_up_to_date() -> None:
    root = paths.repo_root()
    known = json.loads((root / KNOWN).read_text(encoding="utf-8"))
    assert render(known) in (root / PAGE).read_text(encoding="utf-8")


def test_every_type_of_ours_is_in_the_table() -> None:
    known = json.loads((paths.repo_root() / KNOWN).read_text(encoding="utf-8"))
    ours = {name for name, row in CACHE_TYPES.items() if row.codebook}
    assert all(ours < set(answer["types"]) for answer in known.values())


def test_the_old_command_names_the_new_one(tmp_path: Path) -> None:
    model = write_model(LAYOUTS["qwen2"], tmp_path / "m.gguf")
    code, out, err = call("anchor", "bias", model)
    assert code == 0 and re.search(r"\| 3 \| \d", out)
    assert "`turbo-eval inspect" in err
