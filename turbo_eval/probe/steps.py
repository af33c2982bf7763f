"""One layer on its own: does each step follow from the one before it, and what does the type cost?

A layer is judged by its own inputs, so that errors of the layers before it don't count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats.codec import decode, gaussian_mse, reference
from turbo_eval.probe.dump import Layer

Floats = NDArray[np.float64]
# order, tensor, detail of a finding
_Note = Callable[[int, str, str], None]

EXACT = 1e-2  # relative error of a step that only turns or scales vectors in f32
CACHE_FACTOR = 1.15  # cache error over that of the reference encoder
# K noise over the part of K that varies from token to token, in units of the type's own.
UNSUITED = 12.0
HARMFUL = 0.1  # … and in units of that part itself: below, no harm is done (f16)


@dataclass(frozen=True)
class Finding:
    """What is wrong in a layer; lower `order` is earlier.

    `costly`: every step is as it should be, but the type does not suit the data.
    """

    layer: int
    order: int
    tensor: str
    detail: str
    costly: bool = False

    def sentence(self) -> str:
        """ "layer 3, K cache: …"."""
        return f"layer {self.layer}, {self.tensor}: {self.detail}"


@dataclass(frozen=True)
class Judged:
    """A layer's figures: squared errors are relative.

    `k_noise`, `v_noise` of the cache against what was written; `k_reference`, `v_reference` the same
    for the type's reference encoder; `k_excess` K's noise over the varying part of K, in units of
    the type's Gaussian error (1: as intended; nan: it is not known); `scores_kld` nats between attention
    weights with written and with cached K, mean over queries and heads; `fa_nmse` of the attention itself.
    """

    layer: int
    k_noise: float
    k_reference: float
    k_excess: float
    v_noise: float
    v_reference: float
    scores_kld: float
    fa_nmse: float
    findings: tuple[Finding, ...]


def judge(layer: Layer) -> Judged:
    """Follow a layer's attention from Q, K and V to its output."""
    found: list[Finding] = []

    def note(order: int, tensor: str, detail: str) -> None:
        found.append(Finding(layer.number, order, tensor, detail))

    _judge_turns(layer, note)
    k, k_noise, k_reference = _judge_cache("K", layer.type_k, layer.k_write, layer.k_cache, 2, note)
    v, v_noise, v_reference = _judge_cache("V", layer.type_v, layer.v_write, layer.v_cache, 3, note)
    weights = attention_weights(layer, k)
    exact = attention_weights(layer, layer.k_write)
    nmse = _judge_attention(layer, k, v, weights, note) if layer.plain else float("nan")
    if layer.rot_out:
        error = _relative(layer.attn_out, rotate(layer.fa, layer.rot_out))
        if not error < EXACT:
            note(5, "attention output", f"is not the rotated back output: relative error {error:.2g}")
    excess = _excess(layer, k)
    if excess > UNSUITED and excess * (gaussian_mse(layer.type_k) or 0.0) > HARMFUL:
        share = 1 - _varying(layer.k_write) / float((layer.k_write.astype(np.float64) ** 2).mean())
        found.append(
            Finding(
                layer.number,
                6,
                "K",
                f"{layer.type_k} costs {excess:.0f} times what it costs on Gaussians, over the part of K that"
                f" varies: {100 * share:.1f} % of K's power is the same in every token",
                costly=True,
            )
        )
    return Judged(
        layer=layer.number,
        k_noise=k_noise,
        k_reference=k_reference,
        k_excess=excess,
        v_noise=v_noise,
        v_reference=v_reference,
        scores_kld=_mean_kld(exact, weights),
        fa_nmse=nmse,
        findings=tuple(sorted(found, key=lambda f: f.order)),
    )


def rotate(x: NDArray[np.float32], size: int) -> Floats:
    """x (…, d) times the orthonormal Hadamard matrix in groups of `size`; its own inverse."""
    y: Floats = x.astype(np.float64).reshape(-1, size)
    width = 1
    while width < size:
        y = y.reshape(-1, size // (2 * width), 2, width)
        y = np.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], axis=2)
        width *= 2
    turned: Floats = (y / np.sqrt(size)).reshape(x.shape)
    return turned


def attention_weights(layer: Layer, k: NDArray[np.floating]) -> Floats:
    """Causal softmax (heads, queries, keys) of the layer's attention Q with keys k (tokens, KV heads, d)."""
    return _softmax(layer, layer.q_attn.astype(np.float64), k)


def _scores(layer: Layer, q: NDArray[np.floating], k: NDArray[np.floating]) -> Floats:
    group = q.shape[1] // k.shape[1]
    keys = np.repeat(k.astype(np.float64), group, axis=1)
    scores: Floats = np.einsum("thd,shd->hts", q.astype(np.float64), keys, optimize=True) * layer.scale
    return layer.softcap * np.tanh(scores / layer.softcap) if layer.softcap else scores


def _softmax(layer: Layer, q: NDArray[np.floating], k: NDArray[np.floating]) -> Floats:
    scores = _scores(layer, q, k)
    scores[:, ~_causal(scores.shape[1])] = -np.inf
    weights: Floats = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return weights


def _causal(n: int) -> NDArray[np.bool_]:
    return np.tril(np.ones((n, n), dtype=bool))


def _relative(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    want = want.astype(np.float64)
    return float(np.sqrt(((got - want) ** 2).sum() / max((want**2).sum(), 1e-300)))


def _follows(x: NDArray[np.floating], y: NDArray[np.floating]) -> bool:
    """Whether y (tokens, heads, d) is x with a factor and a constant for each channel of each head: what
    balance and anchor do, and nothing else (both are 1 and 0 without them)."""
    u = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    w = y.astype(np.float64) - y.mean(axis=0, dtype=np.float64)
    factor = (u * w).sum(axis=0) / np.maximum((u * u).sum(axis=0), 1e-300)
    return _relative(factor * u, w) < EXACT


def _judge_turns(layer: Layer, note: _Note) -> None:
    """Rotation, anchor and balance leave the attention scores as they are, but for a constant a query."""
    if not layer.softcap:
        mask = _causal(len(layer.q))
        before, after = _scores(layer, layer.q, layer.k), _scores(layer, layer.q_attn, layer.k_write)
        for scores in (before, after):
            mean = (scores * mask).sum(axis=2, keepdims=True) / mask.sum(axis=1)[None, :, None]
            scores -= mean
            scores[:, ~mask] = 0
        error = _relative(after, before)
        if not error < EXACT:
            note(0, *_who_turned_wrong(layer, error))
            return
    for name, plain, turned, size in (
        ("K", layer.k, layer.k_write, layer.rot_k),
        ("Q", layer.q, layer.q_attn, layer.rot_q),
    ):
        if size and _follows(plain, turned):
            note(0, f"{name} rotation", f"was skipped: {name} goes to the cache's side as it came")
    if layer.rot_v:
        error = _relative(layer.v_write, rotate(layer.v, layer.rot_v))
        if not error < EXACT:
            skipped = _relative(layer.v_write, layer.v) < EXACT
            how = "was skipped" if skipped else f"is wrong: relative error {error:.2g}"
            note(1, "V rotation", f"{how} (groups of {layer.rot_v})")


def _who_turned_wrong(layer: Layer, error: float) -> tuple[str, str]:
    """(tensor, detail) for scores that changed between the projection and the cache."""
    sides = (("K", layer.k, layer.k_write, layer.rot_k), ("Q", layer.q, layer.q_attn, layer.rot_q))
    right = [name for name, x, y, n in sides if n and _follows(x, rotate(y, n))]
    for name, x, y, n in sides:
        if n and _follows(x, y):
            return f"{name} rotation", f"was skipped (groups of {n}); attention scores are off by {error:.2g}"
        if len(right) == 1 and name not in right:
            return f"{name} rotation", f"is wrong (groups of {n}); attention scores are off by {error:.2g}"
    if not layer.rot_k and not layer.rot_q:
        return "Q or K", f"attention scores are off by {error:.2g} before the cache is written"
    return "Q or K rotation or anchor", f"attention scores are off by {error:.2g} before the cache is written"


def _judge_cache(
    side: str, name: str, written: NDArray[np.float32], rows: NDArray[np.uint8], order: int, note: _Note
) -> tuple[Floats, float, float]:
    """(cached values, relative squared error, that of the reference encoder)."""
    values = decode(name, rows)
    error = ((values - written) ** 2).sum(axis=(0, 2))
    power = np.maximum((written.astype(np.float64) ** 2).sum(axis=(0, 2)), 1e-300)
    best = reference(name, written)
    if best is None:
        allowed = (gaussian_mse(name) or np.inf) * power * 2
    else:
        allowed = ((best - written) ** 2).sum(axis=(0, 2)) + 1e-9 * power
    bad = np.flatnonzero(~(error <= CACHE_FACTOR * allowed))
    if bad.size:
        which = "every KV head" if bad.size == len(error) > 1 else f"KV head {', '.join(map(str, bad))}"
        head = int(bad[0])
        note(
            order,
            f"{side} cache",
            f"{which}: the cached values are off by {np.sqrt(error[head] / power[head]):.2g} of what was"
            f" written, {name} explains {np.sqrt(allowed[head] / power[head]):.2g}"
            + _scale_hint(values[:, head], written[:, head]),
        )
    return values, float(error.sum() / power.sum()), float(allowed.sum() / power.sum())


def _scale_hint(values: Floats, written: NDArray[np.float32]) -> str:
    """The factor, if the cached values are the written ones times a constant."""
    factor = float((values * written).sum() / max((written.astype(np.float64) ** 2).sum(), 1e-300))
    if abs(factor - 1) > 0.02 and _relative(values, factor * written) < 0.25:
        return f"; they are {factor:.2g} times what was written: a wrong scale"
    return ""


def _judge_attention(layer: Layer, k: Floats, v: Floats, weights: Floats, note: _Note) -> float:
    want = _apply(weights, v)
    nmse = _relative(layer.fa, want) ** 2
    # Kernels may round Q to 8 bits; what that costs depends on the keys, so it is computed.
    rounded = reference("q8_0", layer.q_attn)
    assert rounded is not None
    allowed = max(1e-3, 9 * _relative(_apply(_softmax(layer, rounded, k), v), want) ** 2)
    if not nmse < allowed:
        error = ((layer.fa - want) ** 2).sum(axis=(0, 2))
        heads = np.flatnonzero(error > error.max() / 10)
        which = "every head" if heads.size == len(error) else f"head {', '.join(map(str, heads))}"
        note(
            4,
            "attention output",
            f"{which}: NMSE {nmse:.2g} against attention over the very cache it read ({layer.type_k}:"
            f"{layer.type_v}), allowed are {allowed:.1g}: the kernel reads or computes wrongly",
        )
    return nmse


def _apply(weights: Floats, v: Floats) -> Floats:
    values = np.repeat(v, weights.shape[0] // v.shape[1], axis=1)
    out: Floats = np.einsum("hts,shd->thd", weights, values, optimize=True)
    return out


def _varying(k: NDArray[np.float32]) -> float:
    """Mean square of what is left of K (tokens, KV heads, d) without its mean over the tokens."""
    return float((k.astype(np.float64) - k.mean(axis=0, dtype=np.float64)).var(axis=0).mean())


def _excess(layer: Layer, k: Floats) -> float:
    own = gaussian_mse(layer.type_k)
    noise = float(((k - layer.k_write) ** 2).mean())
    return noise / max(_varying(layer.k_write), 1e-300) / own if own else float("nan")


def _mean_kld(exact: Floats, other: Floats) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(exact > 0, exact * np.log(exact / np.maximum(other, 1e-300)), 0.0)
    return float(terms.sum(axis=2).mean())
