"""Small random models of several architectures with a large K bias: what the K anchor must be right for
and no model at hand has. Unquantized weights, a vocabulary of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType, TokenType

LAYERS, EMBD, HEADS, KV_HEADS, DIM, FF = 4, 256, 4, 2, 64, 256
VOCAB = 259


@dataclass(frozen=True)
class Layout:
    """`dim`: values of a head, `rotary`: how many turn. `bias`: rms of K's. `extra` adds metadata."""

    arch: str
    rotary: int = DIM
    layer_norm: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    bias: float = 12.0
    dim: int = DIM
    fused_up: bool = False
    ffn_norm: bool = True
    extra: Callable[[Any], None] = lambda writer: None
    tensors: Callable[[], dict[str, np.ndarray[Any, Any]]] = dict


def _yarn(writer: Any) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def _window(writer: Any) -> None:
    writer.add_sliding_window(64)


def _cohere(writer: Any) -> None:
    _window(writer)
    writer.add_logit_scale(0.0625)


def _longrope(writer: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_rope_scaling_attn_factors(1.1)


def _softcap(writer: Any) -> None:
    _window(writer)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)


def _factors(*names: str) -> Callable[[], dict[str, np.ndarray[Any, Any]]]:
    return lambda: {n: np.geomspace(1, 8 * (i + 1), DIM // 2, dtype=np.float32) for i, n in enumerate(names)}


LAYOUTS = {
    "llama": Layout("llama"),
    "llama, frequency factors": Layout("llama", tensors=_factors("rope_freqs.weight")),
    "qwen2": Layout("qwen2"),
    "qwen2, YaRN": Layout("qwen2", extra=_yarn),
    "stablelm, a quarter turns": Layout("stablelm", rotary=DIM // 4, layer_norm=True, norm_bias=True),
    "phi3, long-rope": Layout(
        "phi3",
        fused_up=True,
        extra=_longrope,
        tensors=_factors("rope_factors_short.weight", "rope_factors_long.weight"),
    ),
    "cohere2, window, layers without RoPE": Layout("cohere2", layer_norm=True, ffn_norm=False, extra=_cohere),
    "gemma3, window, norm of K": Layout("gemma3", qk_norm=True, post_norms=True, extra=_window),
}
SOFTCAP = Layout("gemma2", post_norms=True, extra=_softcap)


def write_model(layout: Layout, path: Path) -> Path:
    """The GGUF of that layout. Seeded: always the same."""
    rng = np.random.default_rng(0)

    def matrix(out: int, columns: int) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = rng.standard_normal((out, columns)) * columns**-0.5
        return values.astype(np.float32)

    writer = GGUFWriter(path, layout.arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(EMBD)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(layout.dim)
    writer.add_value_length(layout.dim)
    writer.add_rope_dimension_count(layout.rotary)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_eps(1e-5) if layout.layer_norm else writer.add_layer_norm_rms_eps(1e-5)
    layout.extra(writer)
    _add_vocabulary(writer)

    def norm(name: str, n: int = EMBD) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n, np.float32))
        if layout.norm_bias:
            writer.add_tensor(f"{name}.bias", np.zeros(n, np.float32))

    writer.add_tensor("token_embd.weight", matrix(VOCAB, EMBD) * 16)
    if layout.arch not in ("cohere2", "gemma2"):
        writer.add_tensor("output.weight", matrix(VOCAB, EMBD) * 2)
    norm("output_norm")
    for name, values in layout.tensors().items():
        writer.add_tensor(name, values)
    kv = KV_HEADS * layout.dim
    for i in range(LAYERS):
        blk = f"blk.{i}"
        norms = ["attn_norm", *(["ffn_norm"] if layout.ffn_norm else [])]
        norms += ["post_attention_norm", "post_ffw_norm"] if layout.post_norms else []
        for name in norms:
            norm(f"{blk}.{name}")
        if layout.qk_norm:
            for name in ("attn_q_norm", "attn_k_norm"):
                writer.add_tensor(f"{blk}.{name}.weight", np.ones(layout.dim, np.float32))
        for name, rows in (("attn_q", HEADS * layout.dim), ("attn_k", kv), ("attn_v", kv)):
            writer.add_tensor(f"{blk}.{name}.weight", matrix(rows, EMBD))
        writer.add_tensor(f"{blk}.attn_output.weight", matrix(EMBD, HEADS * layout.dim))
        if layout.bias:
            writer.add_tensor(
                f"{blk}.attn_k.bias", (rng.standard_normal(kv) * layout.bias).astype(np.float32)
            )
        if not layout.fused_up:
            writer.add_tensor(f"{blk}.ffn_gate.weight", matrix(FF, EMBD))
        writer.add_tensor(f"{blk}.ffn_up.weight", matrix(FF * (2 if layout.fused_up else 1), EMBD))
        writer.add_tensor(f"{blk}.ffn_down.weight", matrix(EMBD, FF))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
