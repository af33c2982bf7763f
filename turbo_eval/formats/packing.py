"""Blocks of our types read and written from their description alone: the reference for the library.

The description is docs/explanation/cache-types.md. Nothing here is shared with ggml's code,
and nothing is fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats.cache_types import BOOKS, CACHE_TYPES, Codebook
from turbo_eval.formats.codebooks import GROUP, Floats, encode, scales

Bytes = NDArray[np.uint8]
Codes = NDArray[np.uint8]

BLOCK = 64
GROUPS = BLOCK // GROUP


def levels(book: Codebook) -> Floats:
    """Signed level of every code: code = sign · n + magnitude index, sign 1 for negative."""
    magnitudes = np.array(book.magnitudes, dtype=np.float64)
    return np.concatenate([magnitudes, -magnitudes])


def _places(book: Codebook) -> Iterator[tuple[int, int, int, int]]:
    """Value, bit of its code, byte of the block and bit of that byte, for every bit of every code."""
    width = (2 * len(book.magnitudes) - 1).bit_length()
    for i, bit in product(range(BLOCK), range(width)):
        yield i, bit, *book.place(i, bit)


def pack(name: str, scale: Bytes, codes: Codes) -> Bytes:
    """Blocks from scale bytes (n, 2) and codes (n, 64); returns (n, bytes a block)."""
    out = np.zeros((len(codes), CACHE_TYPES[name].block_bytes), np.uint8)
    out[:, :GROUPS] = scale
    for i, bit, byte, shift in _places(BOOKS[name]):
        out[:, byte] |= ((codes[:, i] >> bit) & 1) << shift
    return out


def unpack(name: str, blocks: Bytes) -> tuple[Bytes, Codes]:
    """Scale bytes (n, 2) and codes (n, 64) of blocks (n, bytes a block)."""
    codes = np.zeros((len(blocks), BLOCK), np.uint8)
    for i, bit, byte, shift in _places(BOOKS[name]):
        codes[:, i] |= ((blocks[:, byte] >> shift) & 1) << bit
    return blocks[:, :GROUPS], codes


def decode(name: str, blocks: Bytes) -> Floats:
    """Values (n, 64) of blocks (n, bytes a block)."""
    scale, codes = unpack(name, blocks)
    return np.repeat(scales()[scale], GROUP, axis=1) * levels(BOOKS[name])[codes]


def encode_blocks(name: str, x: Floats) -> Bytes:
    """Blocks (n, bytes a block) of values (n, 64), with the documented search."""
    book = BOOKS[name]
    groups = x.reshape(-1, GROUP)
    found = encode(groups, np.array(book.magnitudes, dtype=np.float64), book.rms1)
    scale = np.searchsorted(scales(), found.scale).astype(np.uint8).reshape(-1, GROUPS)
    sign = (groups < 0).astype(np.uint8) * len(book.magnitudes)
    codes = (found.index.astype(np.uint8) + sign).reshape(-1, BLOCK)
    return pack(name, scale, codes)


def every_code_everywhere(name: str, seed: int = 0) -> tuple[Bytes, Codes]:
    """Scale bytes and codes of blocks in which each code stands at each position.

    The other positions hold what Gaussians would, so that the encoder's search finds the scale again:
    (64 · number of codes, 64). Scales are normal halves.
    """
    book = BOOKS[name]
    n = 2 * len(book.magnitudes)
    rng = np.random.default_rng(seed)
    rows = np.arange(BLOCK * n)
    # A Gaussian's 32 quantiles, shuffled: no group's rms strays from what the search expects.
    quantiles = [NormalDist(0, book.rms1).inv_cdf((i + 0.5) / GROUP) for i in range(GROUP)]
    nearest = np.abs(np.array(quantiles)[:, None] - levels(book)).argmin(axis=1).astype(np.uint8)
    codes = rng.permuted(np.broadcast_to(nearest, (len(rows) * GROUPS, GROUP)), axis=1).reshape(-1, BLOCK)
    codes[rows, rows // n] = rows % n
    # Not one of two groups alike: a group index that is ignored must show.
    scale = rng.integers(100, 180, size=(len(rows), GROUPS), dtype=np.uint8)
    return scale, codes
