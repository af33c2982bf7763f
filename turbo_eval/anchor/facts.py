"""What the attention of a model is made of, layer by layer, read from its GGUF file without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from turbo_eval.errors import UsageError
from turbo_eval.inputs.gguf_info import GgufInfo, Header, describe, read_header

# Architectures whose RoPE pairs are neighbours (2f, 2f+1); the others pair f with f + n_rot/2.
# llama.cpp at the pin: llama_model_rope_type().
NEIGHBOURS = frozenset(
    [
        "arcee",
        "arctic",
        "baichuan",
        "bailingmoe",
        "chameleon",
        "chatglm",
        "cohere2",
        "cohere2moe",
        "command-r",
        "deci",
        "deepseek",
        "deepseek2",
        "deepseek2-ocr",
        "deepseek32",
        "deepseek4",
        "dots3note",
        "eagle3",
        "ernie4_5",
        "ernie4_5-moe",
        "glm-dsa",
        "granite",
        "granite_swa",
        "granitehybrid",
        "granitemoe",
        "graniteswitch",
        "internlm2",
        "llada",
        "llama",
        "llama-embed",
        "llama4",
        "maincoder",
        "minicpm",
        "mistral3",
        "mistral4",
        "muse-glimmer",
        "nanbeige",
        "neo-bert",
        "olmo",
        "plm",
        "pockettts",
        "smollm3",
        "starcoder",
        "xverse",
    ]
)
# Their graph leaves the biases of Q, K and V out, should a file have some.
WITHOUT_BIAS = frozenset({"mimo2"})
# More of any of these is no model, but a broken file.
_MANY = 4096

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One layer that keeps keys and values.

    Attributes:
        index: of its block.
        heads, kv_heads, dim_k, dim_v: of the attention; dims in values.
        fused: the projections of Q, K and V are one tensor.
        k_bias: the projection of K has a bias.
        k_norm, q_norm: a norm with weights follows the projection.
        sinks: attention sinks.
        latent: K is one compressed vector for all heads (multi-head latent attention).
        sliding: attends to a sliding window only; None: the file does not say.
    """

    index: int
    heads: int
    kv_heads: int
    dim_k: int
    dim_v: int
    fused: bool
    k_bias: bool
    k_norm: bool
    q_norm: bool
    sinks: bool
    latent: bool
    sliding: bool | None


@dataclass(frozen=True)
class Facts:
    """A model's attention.

    Attributes:
        layers: those that keep keys and values.
        window: of the sliding layers, in tokens; 0: none.
        softcap: of attention logits; 0: none.
        rope_base, rope_dims: base of the angles; values of a head that turn.
    """

    path: Path
    info: GgufInfo
    header: Header
    layers: tuple[Layer, ...]
    window: int
    softcap: float
    rope_base: float
    rope_dims: int

    @property
    def recurrent(self) -> int:
        """Blocks without keys and values."""
        return self.info.n_layer - len(self.layers)

    def theta(self) -> Array:
        """[pair], radians a position, fastest first. Scaling of the context by YaRN is left out."""
        dims = self.rope_dims
        factors = self.tensor("rope_freqs.weight")
        with np.errstate(all="ignore"):
            theta = np.asarray(
                self.rope_base ** (-2.0 * np.arange(dims // 2) / max(dims, 1)), dtype=np.float64
            )
            if factors is not None and factors.shape == theta.shape:
                theta = theta / factors
        return np.clip(np.nan_to_num(theta, nan=1.0), 1e-12, 1e3)  # a broken file may hold anything

    def tensor(self, name: str) -> Array | None:
        """In float64, [rows, columns] or [columns]; None: not there, or of a type that `gguf` cannot read."""
        found = self.header.tensors.get(name)
        if found is None:
            return None
        try:
            kind = GGMLQuantizationType(found[0])
            block, width = GGML_QUANT_SIZES[kind]
            shape = [d for d in reversed(found[1]) if d != 1] or [1]
            count = math.prod(shape)
            with self.path.open("rb") as stream:
                stream.seek(self.header.data_start + found[2])
                raw = np.frombuffer(stream.read(count // block * width), dtype=np.uint8)
            if kind == GGMLQuantizationType.F32:
                values = raw.view(np.float32)
            elif kind == GGMLQuantizationType.F16:
                values = raw.view(np.float16)
            else:
                values = dequantize(raw.reshape(-1, width), kind)
            return np.asarray(values, dtype=np.float64).reshape(shape)
        except (ValueError, KeyError, NotImplementedError, OverflowError):
            return None


def read_facts(path: Path) -> Facts:
    """Read them.

    Raises:
        UsageError: missing, not GGUF, truncated, or no language model.
    """
    header = read_header(path)
    info = describe(path, header)
    if max(info.n_layer, info.n_head, info.n_head_kv) > _MANY or info.head_dim_k > _MANY**2:
        raise UsageError(
            f"{path} claims {info.n_layer} layers, {info.n_head} heads of {info.head_dim_k} values",
            "download or convert it again",
        )
    per_layer = {key: _array(header, info.arch, key, info.n_layer) for key in ("head_count", "head_count_kv")}
    pattern = header.fields.get(f"{info.arch}.attention.sliding_window_pattern")
    window = int(_number(header, info.arch, "attention.sliding_window", 0))
    blocks: dict[str, set[str]] = {}
    for name in header.tensors:
        if name.startswith("blk."):
            number, _, rest = name.removeprefix("blk.").partition(".")
            blocks.setdefault(number, set()).add(rest)
    layers = []
    # HRM goes through two stacks of blocks several times, with a cache for each
    looped = 2 * int(_number(header, info.arch, "hrm.layers_per_stack", 0)) or info.n_layer
    for i in range(_with_a_cache(header, info.arch, info.n_layer)):
        names = blocks.get(str(i % looped), set())
        latent = not names.isdisjoint({"attn_kv_a_mqa.weight", "attn_kv.weight"})
        # of linear attention and state-space layers: no keys
        linear = "attn_gate.weight" in names or any(name.startswith("ssm_") for name in names)
        fused = "attn_qkv.weight" in names and "attn_k.weight" not in names
        plain = "attn_k.weight" in names or (fused and not linear)
        heads, kv_heads = per_layer["head_count"][i], per_layer["head_count_kv"][i]
        if not (latent or plain) or (not latent and kv_heads == 0):
            continue
        sliding: bool | None = None if window else False
        if window and isinstance(pattern, list) and len(pattern) > i:
            sliding = bool(pattern[i])
        layers.append(
            Layer(
                index=i,
                heads=heads,
                kv_heads=1 if latent else kv_heads,
                dim_k=info.head_dim_k,
                dim_v=0 if latent else info.head_dim_v,
                fused=fused,
                k_bias=("attn_qkv.bias" if fused else "attn_k.bias") in names
                and info.arch not in WITHOUT_BIAS,
                k_norm="attn_k_norm.weight" in names,
                q_norm="attn_q_norm.weight" in names,
                sinks="attn_sinks.weight" in names or "attn_sinks" in names,
                latent=latent,
                sliding=sliding,
            )
        )
    return Facts(
        path=path,
        info=info,
        header=header,
        layers=tuple(layers),
        window=window,
        softcap=_number(header, info.arch, "attn_logit_softcapping", 0.0),
        rope_base=_number(header, info.arch, "rope.freq_base", 10000.0),
        rope_dims=min(
            int(_number(header, info.arch, "rope.dimension_count", info.head_dim_k)), info.head_dim_k
        ),
    )


def _number(header: Header, arch: str, key: str, default: float) -> float:
    value = header.fields.get(f"{arch}.{key}", default)
    if isinstance(value, list):
        value = max((item for item in value if isinstance(item, int | float)), default=default)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return default
    return float(value)


def _with_a_cache(header: Header, arch: str, n_layer: int) -> int:
    """Layers from the first on that keep keys of their own; later ones read those of another layer."""
    if arch == "gemma3n":
        return min(n_layer, 20)
    return max(0, n_layer - int(_number(header, arch, "attention.shared_kv_layers", 0)))


def _array(header: Header, arch: str, key: str, n_layer: int) -> Sequence[int]:
    """One value a layer, whatever the file has."""
    value = header.fields.get(f"{arch}.attention.{key}")
    if isinstance(value, list):
        numbers = [int(item) for item in value if isinstance(item, int)]
        return [*numbers, *[0] * (n_layer - len(numbers))]
    if value is None and key == "head_count_kv":
        return _array(header, arch, "head_count", n_layer)
    return [value if isinstance(value, int) else 0] * n_layer
