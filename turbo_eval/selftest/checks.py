"""The checks: each yields one line. They run in a worker process, which a crash may take along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats import packing
from turbo_eval.formats.cache_types import BOOKS, CACHE_TYPES
from turbo_eval.formats.codebooks import GROUP, Floats, encode, gaussians, lloyd_step, mse, scales
from turbo_eval.formats.window import DEFAULT, Window, resolve
from turbo_eval.selftest.attention import POSITIONS, attention, beside_window
from turbo_eval.selftest.ggml import Ggml, GgmlError
from turbo_eval.selftest.partition import partition
from turbo_eval.selftest.result import Result
from turbo_eval.util.numbers import AUTO

ROTATIONS = (64, 128, 256)
# Cache types as users name them; f32 is no cache type of interest beside them.
TYPES = tuple(name for name in CACHE_TYPES if name != "f32")
Check = Callable[[Ggml], Result]


def all_checks(window: Window = DEFAULT) -> dict[str, Check]:
    """Name → check, in the order of a layer cake: what fails first explains what fails after it.

    Args:
        window: sizes of the exact window that is checked.
    """
    checks: dict[str, Check] = {}
    for name in BOOKS:
        checks[f"codebook {name}"] = partial(_codebook, name)
        checks[f"scales {name}"] = partial(_scales, name)
        checks[f"unpack {name}"] = partial(_unpack, name)
        checks[f"pack {name}"] = partial(_pack, name, Ggml.quantize)
        checks[f"mse {name}"] = partial(_mse, name)
    for size in ROTATIONS:
        checks[f"rotation {size}"] = partial(_rotation, size)
    for name in BOOKS:
        checks[f"cache write {name}"] = partial(_pack, name, Ggml.set_rows)
        checks[f"cache read V {name}"] = partial(_read_v, name)
    for k, v in product(TYPES, TYPES):
        checks[f"attention {k}:{v}"] = partial(attention, k, v)
    if window:
        checks["window partition"] = partial(partition, window)
        for k, v in product(TYPES, TYPES):
            if resolve(AUTO, AUTO, k, v):
                checks[f"window {k}:{v}"] = partial(beside_window, k, v, window)
    return checks


def run_checks(ggml: Ggml, names: list[str], window: Window = DEFAULT) -> Iterator[tuple[str, Result | None]]:
    """(name, None) before and (name, result) after each check."""
    checks = all_checks(window)
    for name in names:
        yield name, None
        missing = [t for t in TYPES if t in name.replace(":", " ").split() and t not in ggml.types]
        try:
            if missing:
                yield name, Result(False, f"this build does not have the type {missing[0]}")
            else:
                yield name, checks[name](ggml)
        except GgmlError as error:
            yield name, Result(False, str(error))


def _codebook(name: str, ggml: Ggml) -> Result:
    """The levels that the library reads, against the definition: a fixed point of Lloyd's step."""
    book = BOOKS[name]
    n = len(book.magnitudes)
    codes = np.tile(np.arange(2 * n, dtype=np.uint8), packing.BLOCK // (2 * n))[None, :]
    one = int(np.flatnonzero(scales() == 1.0)[0])
    read = ggml.dequantize(name, packing.pack(name, np.full((1, 2), one, np.uint8), codes))
    positive, negative = read[0, :n].astype(np.float64), read[0, n : 2 * n].astype(np.float64)
    for index, (level, minus, want) in enumerate(zip(positive, negative, book.magnitudes, strict=True)):
        if level != want:
            return Result(
                False, f"level {index} is {level:g}, by definition {want} ({100 * (level / want - 1):+.0f} %)"
            )
        if minus != -want:
            return Result(False, f"level −{index} is {minus:g}, by definition {-want}")
    moved = lloyd_step(gaussians(2**16, seed=3, octave=True), positive, book.rms1)
    off = float(np.abs(moved - positive).max())
    if off > 0.5:
        return Result(False, f"no fixed point of its derivation: a level moves by {off:.2f}")
    return Result(True, f"{' '.join(map(str, book.magnitudes))}, a fixed point to {off:.2f}")


def _scales(name: str, ggml: Ggml) -> Result:
    book = BOOKS[name]
    codes = np.zeros((256, packing.BLOCK), np.uint8)
    scale = np.stack([np.arange(256), np.arange(255, -1, -1)], axis=1).astype(np.uint8)
    read = ggml.dequantize(name, packing.pack(name, scale, codes)).astype(np.float64)
    want = np.repeat(scales()[scale], GROUP, axis=1) * book.magnitudes[0]
    wrong = np.flatnonzero((read != want).any(axis=1))
    if wrong.size:
        code = int(wrong[0])
        return Result(False, f"scale byte {code} reads as {read[code, 0]:g}, defined is {want[code, 0]:g}")
    return Result(True, "256 scale bytes in both groups")


def _unpack(name: str, ggml: Ggml) -> Result:
    scale, codes = packing.every_code_everywhere(name)
    blocks = packing.pack(name, scale, codes)
    read = ggml.dequantize(name, blocks).astype(np.float64)
    return _compare_values(name, blocks, read, exact=True)


def _read_v(name: str, ggml: Ggml) -> Result:
    """Attention to one position only gives back that position's V, through the device's own decoder."""
    scale, codes = packing.every_code_everywhere(name)
    blocks = packing.pack(name, scale, codes)
    whole = -(-len(blocks) // POSITIONS) * POSITIONS
    blocks = blocks[np.arange(whole) % len(blocks)]  # from the start again until the last cache is full
    rows = blocks.reshape(-1, POSITIONS, blocks.shape[1])
    out = []
    for cache in rows:
        one_hot = np.full((POSITIONS, POSITIONS), -np.inf, np.float16)
        np.fill_diagonal(one_hot, 0)
        k = np.zeros((POSITIONS, 1, 2 * packing.BLOCK), np.uint8)  # f16 zeros
        q = np.zeros((1, POSITIONS, packing.BLOCK), np.float32)
        out.append(ggml.attention(q, k, cache[:, None, :], one_hot, ("f16", name), scale=1.0)[:, 0])
    return _compare_values(name, blocks, np.concatenate(out).astype(np.float64), exact=False)


def _compare_values(name: str, blocks: packing.Bytes, read: Floats, *, exact: bool) -> Result:
    want = packing.decode(name, blocks)
    tolerance = 0.0 if exact else 2e-3 * np.abs(want)  # half-precision accumulators
    wrong = ~(np.abs(read - want) <= tolerance)
    n = 2 * len(BOOKS[name].magnitudes)
    if not wrong.any():
        return Result(True, f"{n} codes at {packing.BLOCK} positions")
    position = int(np.flatnonzero(wrong.any(axis=0))[0])
    row = int(np.flatnonzero(wrong[:, position])[0])
    detail = (
        f"{int(wrong.any(axis=0).sum())} of {packing.BLOCK} positions are wrong, first position {position}:"
        f" {read[row, position]:g} instead of {want[row, position]:g}"
    )
    for other in range(packing.BLOCK):
        # A code in the right place under the wrong scale, or the whole value of another place.
        if other != position and np.array_equal(read[:, position], want[:, other]):
            return Result(False, f"{detail}; it holds what belongs to position {other}")
    unscaled = np.abs(read) / np.repeat(scales()[blocks[:, :2]], GROUP, axis=1)
    levels = np.abs(want) / np.repeat(scales()[blocks[:, :2]], GROUP, axis=1)
    for other in range(packing.BLOCK):
        if other != position and np.allclose(unscaled[:, position], levels[:, other], rtol=2e-3):
            return Result(False, f"{detail}; it holds the code that belongs to position {other}")
    return Result(False, detail)


def _pack(name: str, writer: Callable[[Ggml, str, NDArray[np.float32]], packing.Bytes], ggml: Ggml) -> Result:
    """Values that a block holds exactly must come out as that block; Gaussians as the search says."""
    scale, codes = packing.every_code_everywhere(name)
    blocks = packing.pack(name, scale, codes)
    write = partial(writer, ggml, name)
    written = write(packing.decode(name, blocks).astype(np.float32))
    got_scale, got = packing.unpack(name, written)
    # A group without its largest codes can be held by more than one scale: then values decide.
    same_value = np.isclose(packing.decode(name, written), packing.decode(name, blocks), rtol=1e-6)
    wrong = ~same_value
    if wrong.any():
        position = int(np.flatnonzero(wrong.any(axis=0))[0])
        row = int(np.flatnonzero(wrong[:, position])[0])
        detail = (
            f"{int(wrong.any(axis=0).sum())} of {packing.BLOCK} positions are wrong, first position"
            f" {position}: code {codes[row, position]} is written as {got[row, position]}"
        )
        for other in range(packing.BLOCK):
            if other != position and np.array_equal(got[:, position], codes[:, other]):
                return Result(False, f"{detail}; there stands the code of position {other}")
        if got[row, position] == codes[row, position]:
            group = position // GROUP
            detail = (
                f"the scale of group {group} is written as {got_scale[row, group]}"
                f" instead of {scale[row, group]}"
            )
        return Result(False, detail)
    x = gaussians(2**14, seed=11, octave=True).astype(np.float32)
    same = write(x.reshape(-1, packing.BLOCK)) == packing.encode_blocks(name, x.astype(np.float64))
    share = float(same.all(axis=1).mean())
    # Sums in another order may choose the other of two scales of equal error, rarely.
    if share < 0.99:
        return Result(False, f"only {100 * share:.1f} % of random blocks are what the search defines")
    return Result(True, f"every code at every position, {100 * share:.2f} % of random blocks byte for byte")


def _mse(name: str, ggml: Ggml) -> Result:
    book = BOOKS[name]
    x = gaussians(2**17, seed=5, octave=False)
    theory = mse(x, encode(x, np.array(book.magnitudes, dtype=np.float64), book.rms1))
    rows = x.reshape(-1, packing.BLOCK)
    read = ggml.dequantize(name, ggml.quantize(name, rows.astype(np.float32)))
    got = float(((read - rows) ** 2).sum() / (rows**2).sum())
    detail = f"{got:.5f}, the definition gives {theory:.5f}, limit {book.mse_limit}"
    return Result(got <= book.mse_limit and abs(got / theory - 1) < 0.01, detail)


def _hadamard(n: int) -> Floats:
    matrix: Floats = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(n)
    return matrix


def _rotation(size: int, ggml: Ggml) -> Result:
    """Head vectors one after the other, as the graph hands them over, rotated in groups of `size`."""
    matrix = _hadamard(size)
    x = np.random.default_rng(size).standard_normal((24, size)).astype(np.float32)
    once = ggml.hadamard(matrix.astype(np.float32), x)
    error = _relative(once, x @ matrix)
    if not error < 1e-5:
        for other in ROTATIONS:
            if other != size and x.size % other == 0:
                turned = x.reshape(-1, other) @ _hadamard(other)
                if _relative(once.reshape(-1, other), turned) < 1e-5:
                    return Result(False, f"rotates groups of {other} instead of {size}")
        return Result(False, f"relative error {error:.2g} against the matrix")
    back = _relative(ggml.hadamard(matrix.astype(np.float32), once), x)
    if not back < 1e-5:
        return Result(False, f"twice is not the identity: relative error {back:.2g}")
    return Result(True, f"relative error {error:.1e}, {back:.1e} there and back")


def _relative(got: NDArray[Any], want: NDArray[Any]) -> float:
    return float(np.sqrt(((got - want) ** 2).sum() / (want.astype(np.float64) ** 2).sum()))
