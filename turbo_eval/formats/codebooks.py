"""Derivation of our types' codebooks, and the encoder they are made for.

A codebook is not Lloyd-Max's: the encoder searches a coarse scale per 32 values, and the best
levels for that encoder differ from those for a known scale. Lloyd's iteration alternates the
encoder of `ggml-turbo-impl.h` (patches/) with the least-squares level of each cell, on Gaussians
whose rms covers one octave of the scale grid; the result is put on the integer grid of int8 that
costs the least error. docs/explanation/cache-types.md documents the format byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats.cache_types import Codebook

Floats = NDArray[np.float64]

GROUP = 32  # values that share a scale
SEARCH = range(-12, 9)  # codes tried, counted from the smallest one not below rms / RMS1
MAX_LEVEL = 127  # int8


def scales() -> Floats:
    """The 256 scales: twice the half with the bits `code << 6` (4 exponent and 4 mantissa bits)."""
    codes = np.arange(256, dtype=np.uint16) << 6
    return 2.0 * codes.view(np.float16).astype(np.float64)


@dataclass(frozen=True)
class Encoded:
    """`index` (n, 32) magnitude indices, `scale` (n,) scales, `error` (n,) squared errors."""

    index: NDArray[np.int8]
    scale: Floats
    error: Floats


def encode(x: Floats, magnitudes: Floats, rms1: float) -> Encoded:
    """Encode groups as `ggml_turbo_quantize_group` does.

    Args:
        x: (n, 32) values; signs don't matter.
        magnitudes: ascending levels in units of the scale.
        rms1: as in `Codebook`.
    """
    grid = scales()
    magnitude = np.abs(x)
    thresholds = (magnitudes[1:] + magnitudes[:-1]) / 2
    first = np.searchsorted(grid, np.sqrt((magnitude**2).mean(axis=1)) / rms1)
    best = Encoded(np.zeros(x.shape, np.int8), np.zeros(len(x)), np.full(len(x), np.inf))
    for offset in SEARCH:
        scale = grid[np.clip(first + offset, 1, 255)]
        relative = magnitude / scale[:, None]
        index = np.zeros(x.shape, np.int8)
        for threshold in thresholds:
            index += relative > threshold
        error = ((magnitude - scale[:, None] * magnitudes[index]) ** 2).sum(axis=1)
        better = error < best.error
        best.index[better] = index[better]
        best.scale[better] = scale[better]
        best.error[better] = error[better]
    return best


def gaussians(values: int, seed: int, octave: bool) -> Floats:
    """(values // 32, 32) Gaussians; with `octave` each group's rms is drawn from one octave."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((values // GROUP, GROUP))
    if octave:
        x *= 2.0 ** rng.uniform(-0.5, 0.5, size=(len(x), 1))
    return x


def mse(x: Floats, encoded: Encoded) -> float:
    """Squared error per unit of variance."""
    return float(encoded.error.sum() / (x**2).sum())


def lloyd_step(x: Floats, magnitudes: Floats, rms1: float) -> Floats:
    """The least-squares level of each cell under the encoder for `magnitudes`."""
    encoded = encode(x, magnitudes, rms1)
    scale = np.broadcast_to(encoded.scale[:, None], x.shape)
    magnitude = np.abs(x)
    level = np.empty_like(magnitudes)
    for k in range(len(magnitudes)):
        cell = encoded.index == k
        level[k] = (magnitude[cell] * scale[cell]).sum() / (scale[cell] ** 2).sum()
    return level


def derive(book: Codebook, values: int = 2**18, iterations: int = 40, seed: int = 1) -> tuple[int, ...]:
    """The integer codebook, from evenly spaced levels (seeded; nothing of `book`'s levels is used).

    Takes about half a minute for 2**18 values. Only the number of levels and `rms1` come from `book`.
    """
    x = gaussians(values, seed, octave=True)
    n = len(book.magnitudes)
    level = book.rms1 * 2.7 * (np.arange(n) + 0.5) / n
    for _ in range(iterations):
        level = lloyd_step(x, level, book.rms1)
    best: tuple[float, Floats] | None = None
    for top in range(MAX_LEVEL - 12, MAX_LEVEL + 1):
        grid = np.round(level * top / level[-1])
        error = mse(x, encode(x, grid, book.rms1 * top / level[-1]))
        if best is None or error < best[0]:
            best = (error, grid)
    assert best is not None
    return tuple(int(level) for level in best[1])
