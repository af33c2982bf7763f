"""What a cache type, the K anchor and the exact window would do with a model: llama.cpp's answers, foretold.

By architecture they are those of llama.cpp's own test on small random models (configs/architectures.json,
written by `python -m tests.support.archs`); what depends on the file (head sizes, sinks) is read from it.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

from turbo_eval.anchor.facts import Facts, Layer
from turbo_eval.formats.cache_types import CACHE_TYPES, CacheType, stored_dims
from turbo_eval.formats.window import AUTO_FIRST, AUTO_RECENT
from turbo_eval.util import paths

UBATCH = 512  # tokens of a batch that a sliding window keeps besides its own: llama.cpp's default
_PAD = 256  # cells; llama.cpp pads sliding caches to it
_SINKS = (
    "on the CPU and Metal only, since the model has attention sinks, which other devices cannot shift by row"
)


@dataclass(frozen=True)
class Answer:
    """Whether it works on this model, and if not, or if it does little, why."""

    works: bool
    why: str = ""

    def __str__(self) -> str:
        return ("yes" if self.works else "no") + (f" ({self.why})" if self.why else "")


@functools.cache
def architectures() -> dict[str, Any]:
    """By architecture, what the test of llama.cpp at the pin found."""
    path = paths.shipped() / "configs" / "architectures.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def anchor(facts: Facts) -> Answer:
    """With a quantized K."""
    known = architectures().get(facts.info.arch)
    if not facts.layers:
        return Answer(
            False, "no layer has a KV cache" if known is None or known["anchor"] == "on" else known["anchor"]
        )
    if any(layer.latent for layer in facts.layers) and (known is None or known["anchor"] == "on"):
        return Answer(False, "multi-head latent attention")
    if facts.softcap:
        return Answer(False, "attention logit soft-capping")
    if known is None:
        return Answer(True, _untested(facts))
    if known["anchor"] != "on":
        return Answer(False, known["anchor"])
    sinks = any(layer.sinks for layer in facts.layers)
    return Answer(True, _gain(facts) + (f"; {_SINKS}" if sinks else ""))


def _gain(facts: Facts) -> str:
    biased = sum(layer.k_bias and not layer.k_norm for layer in facts.layers)
    normed = sum(layer.k_norm for layer in facts.layers)
    if biased:
        return f"K has a bias in {biased} of {len(facts.layers)} layers"
    if normed:
        return "no constant to take out of K; the balance evens out the weights of its norm"
    return "K has neither bias nor norm: only the balance can gain something"


def _untested(facts: Facts) -> str:
    return f"architecture {facts.info.arch} is not among those that the test of llama.cpp covers"


def window(facts: Facts) -> Answer:
    """The exact window of the newest and first tokens."""
    if not facts.layers:
        return Answer(False, "the model has no KV cache")
    known = architectures().get(facts.info.arch)
    if known is None:
        latent = any(layer.latent for layer in facts.layers)
        return Answer(not latent, "the model caches compressed keys (MLA)" if latent else _untested(facts))
    answer = known["window"]
    if answer == "on" or _by_head_size(answer):
        fits = all(d % 32 == 0 for layer in facts.layers for d in (layer.dim_k, layer.dim_v))
        return Answer(True, "" if fits else "as f16: 32 does not divide the heads, so q8_0 cannot hold them")
    return Answer(False, answer)


def cache_type(facts: Facts, row: CacheType) -> Answer:
    """For K and V at once."""
    if not facts.layers:
        return Answer(False, "the model has no KV cache")
    filled = ""
    for dim_k, dim_v in sorted({(layer.dim_k, layer.dim_v) for layer in facts.layers}):
        stored = stored_dims(dim_k, dim_v, row.name, row.name)
        for letter, dim, kept in zip("kv", (dim_k, dim_v), stored, strict=True):
            if kept % row.block:
                return Answer(False, f"blocks of {row.block} do not divide n_embd_head_{letter}={dim}")
            if kept != dim:
                filled = f"heads of {dim} filled up to {kept}: {row.bpv * kept / dim:.2f} bits per value"
    known = architectures().get(facts.info.arch)
    said = known["types"].get(row.name, "on") if known else "on"
    if said != "on" and not _by_head_size(said):
        return Answer(False, said)
    return Answer(True, "; ".join(filter(None, (filled, "" if known else _untested(facts)))))


def _by_head_size(answer: str) -> bool:
    """The model of the test has other head sizes."""
    return "does not divide" in answer


def cache_bytes(facts: Facts, row: CacheType, ctx: int) -> int:
    """Of K and V of one sequence of `ctx` tokens.

    Sliding layers keep their window and a batch; they count as the others if the file doesn't name them.
    """
    return math.ceil(sum(cells(facts, layer, ctx) * _layer_bits(layer, row) / 8 for layer in facts.layers))


def window_bytes(facts: Facts) -> int:
    """Of the exact window, 128 newest and 4 first tokens: q8_0, or f16 where 32 doesn't divide the heads."""
    row = CACHE_TYPES["q8_0" if not window(facts).why else "f16"]
    exact = AUTO_RECENT + AUTO_FIRST
    slots = max(min((exact + 1 + 15) // 16 * 16, math.floor(1.15 * exact)), exact + 1)
    return math.ceil(sum(slots * _layer_bits(layer, row) / 8 for layer in facts.layers))


def cells(facts: Facts, layer: Layer, ctx: int) -> int:
    """Tokens that the layer keeps."""
    if not layer.sliding:
        return ctx
    return min(ctx, (facts.window + UBATCH + _PAD - 1) // _PAD * _PAD)


def _layer_bits(layer: Layer, row: CacheType) -> float:
    return layer.kv_heads * sum(stored_dims(layer.dim_k, layer.dim_v, row.name, row.name)) * row.bpv
