"""turbo3 and turbo4 read and written from docs/cache-types.md alone: the reference for the library.

Nothing here is shared with ggml's code, and nothing is fast.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats.cache_types import CACHE_TYPES
from turbo_eval.formats.codebooks import CODEBOOKS, GROUP, Codebook, Floats, encode, scales

Bytes = NDArray[np.uint8]
Codes = NDArray[np.uint8]

BOOKS: dict[str, Codebook] = {book.name: book for book in CODEBOOKS}
BLOCK = 64
GROUPS = BLOCK // GROUP
_TURBO3_QS, _TURBO3_QH, _TURBO4_QS = 2, 18, 2  # first byte of each plane


def levels(book: Codebook) -> Floats:
    """Signed level of every code: code = sign · n + magnitude index, sign 1 for negative."""
    magnitudes = np.array(book.magnitudes, dtype=np.float64)
    return np.concatenate([magnitudes, -magnitudes])


def pack(name: str, scale: Bytes, codes: Codes) -> Bytes:
    """Blocks from scale bytes (n, 2) and codes (n, 64); returns (n, bytes a block)."""
    n = len(codes)
    out = np.zeros((n, CACHE_TYPES[name].block_bytes), np.uint8)
    out[:, :GROUPS] = scale
    for g in range(GROUPS):
        group = codes[:, g * GROUP : (g + 1) * GROUP]
        if name == "turbo3":
            for i in range(GROUP):
                b, k = i % 8, i // 8
                out[:, _TURBO3_QS + 8 * g + b] |= (group[:, i] & 3) << (2 * k)
                bit = 4 * (k // 2) + 2 * (b // 4) + k % 2
                out[:, _TURBO3_QH + 4 * g + b % 4] |= (group[:, i] >> 2) << bit
        else:
            for i in range(GROUP):
                out[:, _TURBO4_QS + 16 * g + i % 16] |= group[:, i] << (4 * (i // 16))
    return out


def unpack(name: str, blocks: Bytes) -> tuple[Bytes, Codes]:
    """Scale bytes (n, 2) and codes (n, 64) of blocks (n, bytes a block)."""
    n = len(blocks)
    codes = np.zeros((n, BLOCK), np.uint8)
    for g in range(GROUPS):
        for i in range(GROUP):
            if name == "turbo3":
                b, k = i % 8, i // 8
                index = (blocks[:, _TURBO3_QS + 8 * g + b] >> (2 * k)) & 3
                sign = (blocks[:, _TURBO3_QH + 4 * g + b % 4] >> (4 * (k // 2) + 2 * (b // 4) + k % 2)) & 1
                codes[:, g * GROUP + i] = sign << 2 | index
            else:
                codes[:, g * GROUP + i] = (blocks[:, _TURBO4_QS + 16 * g + i % 16] >> (4 * (i // 16))) & 15
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
