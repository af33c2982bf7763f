"""Random-weight GGUF models of a given shape, to measure speed where no real model can be brought."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from turbo_eval.errors import UsageError
from turbo_eval.util.files import writing
from turbo_eval.util.paths import cache_dir


@dataclass(frozen=True)
class Shape:
    """A model; counts per model, dims in values.

    Attributes:
        weights: q4_0, q8_0 or f16.
        arch: llama, or qwen2: Q, K and V have biases, K's so large that the K anchor is on.
    """

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ff: int = 14336
    vocab: int = 32000
    ctx: int = 131072
    weights: str = "q4_0"
    arch: str = "llama"

    @property
    def embd(self) -> int:
        return self.heads * self.head_dim

    def name(self) -> str:
        return (
            f"synthetic-l{self.layers}-h{self.heads}x{self.kv_heads}x{self.head_dim}"
            f"-ff{self.ff}-v{self.vocab}-{self.weights}" + (f"-{self.arch}" if self.arch != "llama" else "")
        )


PRESETS = {
    "8b": Shape(),
    "8b-mha": Shape(kv_heads=32),
    "8b-head64": Shape(heads=64, head_dim=64),
    "8b-head256": Shape(heads=16, head_dim=256),
    "qwen2-7b": Shape(layers=28, heads=28, kv_heads=4, ff=18944, arch="qwen2"),
    "1b": Shape(layers=16, heads=32, head_dim=64, ff=8192),
    "tiny": Shape(layers=2, heads=4, kv_heads=2, head_dim=64, ff=512, vocab=512, ctx=8192),
}


def parse_shape(text: str) -> Shape:
    """Read "8b" or "8b,layers=4,head_dim=256" or "layers=…,…".

    Raises:
        UsageError: unknown preset, key or value, or dims that q4_0 and q8_0 blocks don't divide.
    """
    shape = Shape()
    known = {f.name: f.type for f in fields(Shape)}
    for part in (p.strip() for p in text.split(",")):
        key, _, value = part.partition("=")
        if not value and key in PRESETS:
            shape = PRESETS[key]
            continue
        if key not in known or not value:
            raise UsageError(
                f"--synthetic {part!r} is no preset ({', '.join(PRESETS)}) and no {'|'.join(known)}=N",
                "write it like 8b,layers=4",
            )
        try:
            changes: dict[str, Any] = {key: value if key in ("weights", "arch") else int(value)}
            shape = replace(shape, **changes)
        except ValueError:
            raise UsageError(f"--synthetic {part!r}: {value!r} is no number") from None
    if shape.weights not in ("q4_0", "q8_0", "f16"):
        raise UsageError(f"--synthetic weights={shape.weights} is not q4_0, q8_0 or f16")
    if shape.arch not in ("llama", "qwen2"):
        raise UsageError(f"--synthetic arch={shape.arch} is not llama or qwen2")
    if shape.embd % 32 or shape.ff % 32 or shape.heads % shape.kv_heads:
        raise UsageError(
            "--synthetic: heads × head_dim and ff must be multiples of 32, heads one of kv_heads"
        )
    return shape


def synthetic_model(shape: Shape) -> Path:
    """The GGUF of that shape in the cache folder, written if it isn't there. Seeded: always the same.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    path = cache_dir() / "synthetic" / f"{shape.name()}.gguf"
    if path.exists():
        return path
    scratch = path.with_suffix(".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(shape, scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    return path


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape as numpy has it, whether it is a matrix of weights); norms and biases have one dim."""
    kv = shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab, shape.embd), True
    yield "output_norm.weight", (shape.embd,), False
    yield "output.weight", (shape.vocab, shape.embd), True
    for layer in range(shape.layers):
        for name, dims, matrix in (
            ("attn_norm", (shape.embd,), False),
            ("attn_q", (shape.embd, shape.embd), True),
            ("attn_k", (kv, shape.embd), True),
            ("attn_v", (kv, shape.embd), True),
            ("attn_output", (shape.embd, shape.embd), True),
            ("ffn_norm", (shape.embd,), False),
            ("ffn_gate", (shape.ff, shape.embd), True),
            ("ffn_up", (shape.ff, shape.embd), True),
            ("ffn_down", (shape.embd, shape.ff), True),
        ):
            yield f"blk.{layer}.{name}.weight", dims, matrix
        if shape.arch == "qwen2":
            for name, size in (("attn_q", shape.embd), ("attn_k", kv), ("attn_v", kv)):
                yield f"blk.{layer}.{name}.bias", (size,), False


def _write(shape: Shape, path: Path) -> None:
    writer = GGUFWriter(path, shape.arch)
    writer.add_name(shape.name())
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.ctx)
    writer.add_embedding_length(shape.embd)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")  # token ids only: enough for a benchmark
    kinds = {
        "q4_0": GGMLQuantizationType.Q4_0,
        "q8_0": GGMLQuantizationType.Q8_0,
        "f16": GGMLQuantizationType.F16,
    }
    kind = kinds[shape.weights]
    rng = np.random.default_rng(0)
    layout = list(_tensors(shape))
    for name, dims, matrix in layout:
        if not matrix:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * dims[0])
        elif shape.weights == "f16":
            writer.add_tensor_info(name, dims, np.dtype(np.float16), 2 * dims[0] * dims[1])
        else:
            row = dims[1] // 32 * _BLOCK_BYTES[shape.weights]
            writer.add_tensor_info(name, (dims[0], row), np.dtype(np.uint8), dims[0] * row, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dims, matrix in layout:
        if name.endswith(".bias"):
            size = _BIAS if ".attn_k." in name else 0
            writer.write_tensor_data(rng.choice(np.array([-size, size], np.float32), dims))
        else:
            writer.write_tensor_data(_random(rng, dims, shape.weights if matrix else ""))
    writer.close()


_BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}
# Size of K's bias. The standard deviation of the rest of K is 1: the anchor takes off what turns slowly, and
# balances the rest. It is the same in all layers, so that none of them is given q8_0.
_BIAS = 4
# Standard deviation of the stored integers: uniform on −8…7 and on −128…127.
_SPREAD = {"q4_0": 4.6, "q8_0": 73.9}


def _random(rng: Any, dims: tuple[int, ...], kind: str) -> Any:
    """Weights with variance 1/n_in, so that activations neither vanish nor blow up; norms are 1."""

    if not kind:
        return np.ones(dims, np.float32)
    rows, columns = dims
    scale = columns**-0.5
    if kind == "f16":
        return (rng.standard_normal(dims, dtype=np.float32) * scale).astype(np.float16)
    width = _BLOCK_BYTES[kind]
    blocks = rng.integers(0, 256, (rows, columns // 32, width), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(scale / _SPREAD[kind]).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
