"""The frozen codebooks: a fixed point of their derivation, and what the built library does with them."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from turbo_eval.formats.cache_types import BOOKS, Codebook
from turbo_eval.formats.codebooks import (
    encode,
    gaussians,
    lloyd_step,
    mse,
    scales,
)
from turbo_eval.llama.build import Build
from turbo_eval.util import paths

BOUNDS = {"turbo2": 0.106, "turbo3": 0.0265, "turbo4": 0.0061}
BLOCK_BYTES = {"turbo2": 18, "turbo3": 26, "turbo4": 34}


@pytest.mark.parametrize("book", BOOKS.values(), ids=lambda b: b.name)
def test_the_patch_holds_the_frozen_table(book: Codebook) -> None:
    text = "".join(path.read_text() for path in paths.patches_dir().glob("*.patch"))
    table = re.search(rf"GGML_TABLE_BEGIN\(int8_t, kvalues_{book.name}_mag, \d\)\n\+([^\n]*)\n", text)
    assert table is not None
    assert tuple(int(n) for n in table.group(1).replace(",", " ").split()) == book.magnitudes
    rms1 = re.search(rf"#define GGML_{book.name.upper()}_RMS ([\d.]+)f", text)
    assert rms1 is not None
    assert float(rms1.group(1)) == book.rms1


@pytest.mark.parametrize("book", BOOKS.values(), ids=lambda b: b.name)
def test_a_lloyd_step_stays_on_the_frozen_levels(book: Codebook) -> None:
    levels = np.array(book.magnitudes, dtype=np.float64)
    moved = lloyd_step(gaussians(2**18, seed=3, octave=True), levels, book.rms1)
    assert np.abs(moved - levels).max() < 0.3, moved


def test_a_wrong_level_is_no_fixed_point() -> None:
    levels = np.array([13, 41, 74, 123 * 0.8])
    moved = lloyd_step(gaussians(2**16, seed=3, octave=True), levels, BOOKS["turbo3"].rms1)
    assert np.abs(moved - levels).max() > 3


class Library:
    """libggml-base of the CPU build: quantize and dequantize rows by type name."""

    def __init__(self, folder: Path) -> None:
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        self.lib = ctypes.CDLL(str(folder / f"libggml-base{suffix}"))

    def quantize(self, name: str, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        out = np.zeros(x.size // 64 * BLOCK_BYTES[name], np.uint8)
        function = self.lib[f"quantize_row_{name}_ref"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        function(x.ctypes.data, out.ctypes.data, x.size)
        return out

    def dequantize(self, name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
        out = np.full(blocks.size // BLOCK_BYTES[name] * 64, np.nan, np.float32)
        function = self.lib[f"dequantize_row_{name}"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        function(blocks.ctypes.data, out.ctypes.data, out.size)
        return out


@pytest.fixture(scope="module")
def library(build: Build) -> Library:
    return Library(build.bin_dir)


@pytest.mark.parametrize("book", BOOKS.values(), ids=lambda b: b.name)
def test_mse_of_a_million_gaussians(library: Library, book: Codebook) -> None:
    x = gaussians(2**20, seed=11, octave=False)
    flat = x.astype(np.float32).ravel()
    back = library.dequantize(book.name, library.quantize(book.name, flat)).astype(np.float64)
    measured = float(((back - flat) ** 2).sum() / (flat.astype(np.float64) ** 2).sum())
    model = mse(x, encode(x, np.array(book.magnitudes, dtype=np.float64), book.rms1))
    print(
        f"\n{book.name}: MSE {measured:.5f} at {book.bits} bpv (bound {BOUNDS[book.name]}; model {model:.5f})"
    )
    assert measured <= BOUNDS[book.name]
    assert measured == pytest.approx(model, rel=1e-3)


def unpack(name: str, block: NDArray[np.uint8]) -> NDArray[np.float64]:
    """One block as docs/explanation/cache-types.md describes it, value by value."""
    magnitudes = next(book.magnitudes for book in BOOKS.values() if book.name == name)
    out = np.zeros(64)
    for value in range(64):
        group, i = divmod(value, 32)
        if name == "turbo2":
            code = int(block[2 + 8 * group + i % 8]) >> (2 * (i // 8)) & 3
            index, negative = code & 1, code >> 1
        elif name == "turbo3":
            b, k = i % 8, i // 8
            index = int(block[2 + 8 * group + b]) >> (2 * k) & 3
            negative = int(block[18 + 4 * group + b % 4]) >> (4 * (k // 2) + 2 * (b // 4) + k % 2) & 1
        else:
            nibble = int(block[2 + 16 * group + i % 16]) >> (4 * (i // 16)) & 15
            index, negative = nibble & 7, nibble >> 3
        out[value] = scales()[block[group]] * magnitudes[index] * (-1 if negative else 1)
    return out


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_every_byte_means_what_the_document_says(library: Library, name: str) -> None:
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, size=(64, BLOCK_BYTES[name]), dtype=np.uint8)
    blocks[:, 0] = np.arange(64) * 4
    blocks[:, 1] = np.arange(64) * 4 + 3
    got = library.dequantize(name, blocks.ravel()).reshape(-1, 64)
    for block, values in zip(blocks, got, strict=True):
        np.testing.assert_array_equal(values, unpack(name, block).astype(np.float32))


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_what_the_format_cannot_hold_never_becomes_nan(library: Library, name: str) -> None:
    x = np.zeros(64, np.float32)
    assert not library.dequantize(name, library.quantize(name, x)).any()
    x[3], x[40] = np.inf, np.nan
    back = library.dequantize(name, library.quantize(name, x))
    assert np.isfinite(back).all()
    assert np.abs(back).min() > 100  # saturated, so that it shows
