"""Cache bytes to values and back by code that isn't ggml's: ours for our types, gguf's for the rest."""

from __future__ import annotations

from functools import lru_cache

import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from turbo_eval.formats import packing
from turbo_eval.formats.cache_types import BOOKS, CACHE_TYPES
from turbo_eval.formats.codebooks import Floats

_PLAIN = {"f16": np.float16, "f32": np.float32}


def readable(name: str) -> bool:
    """Can caches of this type be read here?"""
    return name in BOOKS or name in _PLAIN or name.upper() in GGMLQuantizationType.__members__


def decode(name: str, rows: NDArray[np.uint8]) -> Floats:
    """Values (…, d) of cache bytes (…, bytes)."""
    flat = rows.reshape(-1, rows.shape[-1])
    if name in BOOKS:
        values = packing.decode(name, flat.reshape(-1, CACHE_TYPES[name].block_bytes))
    elif name in _PLAIN:
        values = flat.view(_PLAIN[name]).astype(np.float64)
    else:
        values = gguf.quants.dequantize(flat, GGMLQuantizationType[name.upper()]).astype(np.float64)
    out: Floats = values.reshape(*rows.shape[:-1], -1)
    return out


def reference(name: str, x: NDArray[np.float32]) -> Floats | None:
    """x (…, d) through the type's reference encoder and back; None where there is none but ggml's."""
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    if name in BOOKS:
        blocks = packing.encode_blocks(name, flat.astype(np.float64).reshape(-1, packing.BLOCK))
        return packing.decode(name, blocks).reshape(x.shape)
    if name in _PLAIN:
        return flat.astype(_PLAIN[name]).astype(np.float64).reshape(x.shape)
    try:
        coded = gguf.quants.quantize(flat, GGMLQuantizationType[name.upper()])
    except NotImplementedError:
        return None
    return decode(name, coded).reshape(x.shape)


@lru_cache
def gaussian_mse(name: str) -> float | None:
    """Squared error per unit of variance on Gaussians: as listed, else measured; None: it has no encoder
    here."""
    listed = CACHE_TYPES[name].mse if name in CACHE_TYPES else None
    if listed is not None:
        return listed
    x = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    read = reference(name, x)
    return None if read is None else float(((read - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())
