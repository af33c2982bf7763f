"""Attention of each pair, alone and beside an exact window, against attention in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats import codec, packing
from turbo_eval.formats.cache_types import BOOKS
from turbo_eval.formats.codebooks import Floats
from turbo_eval.formats.window import Window
from turbo_eval.selftest.ggml import Ggml, GgmlError, Segment
from turbo_eval.selftest.result import Result

HEAD_DIMS = (64, 128, 256)
QUERIES = (1, 33)  # the decode kernels and the prefill kernels
HEADS, KV_HEADS = 4, 2
POSITIONS = 512  # from here on the CPU splits the keys of a single query over its threads
# Quantizing q to 8 bits and adding V up in halves cost up to 1e-4; a value in the wrong place about 1.
NMSE_LIMIT = 1e-3
WINDOW_HEAD_DIM = 128
EMPTY_SLOTS = 3


@dataclass(frozen=True)
class _Cache:
    rows: packing.Bytes  # (positions, KV heads, bytes)
    values: Floats  # (positions, KV heads, d)


@lru_cache(maxsize=64)
def _cache(ggml: Ggml, name: str, d: int, seed: int) -> _Cache:
    x = np.random.default_rng((seed, d)).standard_normal((POSITIONS * KV_HEADS, d)).astype(np.float32)
    rows = ggml.quantize(name, x)
    return _Cache(
        rows.reshape(POSITIONS, KV_HEADS, -1), codec.decode(name, rows).reshape(POSITIONS, KV_HEADS, d)
    )


def attention(k: str, v: str, ggml: Ggml) -> Result:
    """A pair's cache alone."""
    worst = 0.0
    for d, queries in product(HEAD_DIMS, QUERIES):
        kc, vc = _cache(ggml, k, d, 1), _cache(ggml, v, d, 2)
        q, mask, scale = _question(d, queries)
        try:
            got = ggml.attention(q, kc.rows, vc.rows, mask, (k, v), scale=scale)
        except GgmlError as error:
            return _refused(k, v, error)
        want = _exact_attention(q, kc.values, vc.values, mask, scale)
        nmse, fault = _compare(got, want, f"head_dim {d}, {_many(queries)}")
        worst = max(worst, nmse)
        if fault:
            return fault
    return Result(True, f"NMSE {worst:.1e}")


def beside_window(k: str, v: str, window: Window, ggml: Ggml) -> Result:
    """A pair's cache beside an exact window: one softmax over both, each key in one of them.

    The window's keys and values are others than the cache's at the same position, its slots stand in any
    order and some are empty: a key read from the wrong side, twice, or not at all changes the result.
    """
    worst = 0.0
    for kind, queries in product(("f16", "q8_0"), QUERIES):
        kc, vc = _cache(ggml, k, WINDOW_HEAD_DIM, 1), _cache(ggml, v, WINDOW_HEAD_DIM, 2)
        q, mask, scale = _question(WINDOW_HEAD_DIM, queries)
        at = POSITIONS - queries + np.arange(queries)[:, None]  # the queries' positions
        keys = np.arange(POSITIONS)[None, :]
        exact = (keys <= at) & ((at - keys < window.recent) | (keys < window.first))
        slots = np.random.default_rng(7).permutation(
            np.concatenate([np.flatnonzero(exact.any(axis=0)), np.full(EMPTY_SLOTS, -1)])
        )
        kw, vw = (_cache(ggml, kind, WINDOW_HEAD_DIM, seed) for seed in (3, 4))
        rest = np.where(exact, -np.inf, mask).astype(np.float16)
        taken = np.where((slots >= 0) & exact[:, slots], 0, -np.inf).astype(np.float16)
        segment = Segment(kind, kw.rows[slots], vw.rows[slots], taken)
        try:
            got = ggml.attention(q, kc.rows, vc.rows, rest, (k, v), scale=scale, window=segment)
        except GgmlError as error:
            return _refused(k, v, error)
        want = _exact_attention(
            q,
            np.concatenate([kc.values, kw.values[slots]]),
            np.concatenate([vc.values, vw.values[slots]]),
            np.concatenate([rest, taken], axis=1),
            scale,
        )
        nmse, fault = _compare(got, want, f"window {window} in {kind}, {_many(queries)}")
        worst = max(worst, nmse)
        if fault:
            return fault
    return Result(True, f"{window} in f16 and q8_0: NMSE {worst:.1e}")


def _question(d: int, queries: int) -> tuple[NDArray[np.float32], NDArray[np.float16], float]:
    """Queries, the mask and the scale. The last query sees every position, the ones before it fewer, as in
    a prompt."""
    q = np.random.default_rng(d).standard_normal((HEADS, queries, d)).astype(np.float32)
    visible = np.arange(POSITIONS)[None, :] <= POSITIONS - queries + np.arange(queries)[:, None]
    return q, np.where(visible, 0, -np.inf).astype(np.float16), 1 / np.sqrt(d)


def _refused(k: str, v: str, error: GgmlError) -> Result:
    """A pair of upstream's own types need not be there."""
    if {k, v} & BOOKS.keys() or k == v:
        raise error
    return Result(None, str(error))


def _many(queries: int) -> str:
    return f"{queries} {'query' if queries == 1 else 'queries'}"


def _compare(got: NDArray[np.float32], want: Floats, where: str) -> tuple[float, Result | None]:
    """The error, and the verdict if it is too large."""
    if np.isnan(got).any():
        share = 100 * float(np.isnan(got).mean())
        return np.nan, Result(False, f"{share:.0f} % of the output is NaN or was never written ({where})")
    nmse = float(((got - want) ** 2).sum() / (want**2).sum())
    if not nmse < NMSE_LIMIT:
        detail = f"NMSE {nmse:.2g} against the reference, limit {NMSE_LIMIT:g} ({where})"
        return nmse, Result(False, detail)
    return nmse, None


def _exact_attention(
    q: NDArray[np.float32], k: Floats, v: Floats, mask: NDArray[np.float16], scale: float
) -> Floats:
    """(queries, heads, d), in double precision, each KV head shared by HEADS / KV_HEADS heads."""
    k = np.repeat(k.transpose(1, 0, 2), HEADS // KV_HEADS, axis=0)
    v = np.repeat(v.transpose(1, 0, 2), HEADS // KV_HEADS, axis=0)
    scores = np.einsum("hqd,hpd->hqp", q.astype(np.float64), k) * scale + mask
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    out: Floats = np.einsum("hqp,hpd->qhd", weights, v)
    return out
