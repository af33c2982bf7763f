"""The noise that a K type makes in attention logits, by layer, from the weights alone.

A type whose error is proportional to the norm of K makes logit noise with an rms of

    sqrt(mse) · |q| · |k| / head_dim      (logits are q·k / sqrt(head_dim); mse: error per unit of variance)

The K anchor takes the constant part out of |k|; the balance, one scale for each RoPE pair of K and its
inverse for Q, brings |q|·|k| down to the sum over pairs of |q_f|·|k_f|. Statistics come from the weights,
as in llama-kv-anchor.cpp: the normalized input of the projections is taken as white.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbo_eval.anchor.facts import NEIGHBOURS, WITHOUT_BIAS, Array, Facts, Layer
from turbo_eval.anchor.kbias import anchor_phase, taken_share


@dataclass(frozen=True)
class Noise:
    """One layer; the largest of its KV heads.

    Attributes:
        bias: largest constant of K in a RoPE pair, before RoPE. 0: none, or a norm follows it.
        taken: share of the constant's energy that the anchor takes out at the context; nan: no constant.
        plain, anchored: |q|·|k| / head_dim without, and with anchor and balance; nan: not known.
    """

    layer: int
    bias: float
    taken: float
    plain: float
    anchored: float


def layer_noise(facts: Facts, layer: Layer, ctx: int) -> Noise:
    """Of one layer at `ctx` tokens."""
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.dim_k
    unknown = Noise(layer.index, 0.0, np.nan, np.nan, np.nan)
    if layer.latent or not heads or not kv_heads or heads % kv_heads:
        return unknown
    found = _projections(facts, layer)
    q_bias, k_bias = _biases(facts, layer)
    mean = np.zeros(kv_heads * dim) if k_bias is None or layer.k_norm else k_bias
    theta = facts.theta() if facts.rope_dims else np.zeros(0)
    bias, taken = _constant(facts, theta, mean.reshape(kv_heads, dim), ctx)
    if found is None:
        return Noise(layer.index, bias, taken, np.nan, np.nan)
    q_var, k_var = found
    if q_bias is not None:
        q_var = q_var + q_bias**2
    if layer.k_norm and k_bias is not None:
        k_var = k_var + k_bias**2
    q_sqr = _normed(facts, layer, "attn_q_norm", q_var) if layer.q_norm else q_var
    k_var = _normed(facts, layer, "attn_k_norm", k_var) if layer.k_norm else k_var
    q_sqr = q_sqr.reshape(kv_heads, heads // kv_heads, dim).mean(axis=1)
    return _combine(facts, layer, theta, q_sqr, k_var.reshape(kv_heads, dim), mean, ctx, bias, taken)


def _combine(
    facts: Facts,
    layer: Layer,
    theta: Array,
    q_sqr: Array,
    k_var: Array,
    mean: Array,
    ctx: int,
    bias: float,
    taken: float,
) -> Noise:
    mean = mean.reshape(k_var.shape)
    e_q = _energies(facts, theta, q_sqr)
    constant = _energies(facts, theta, mean**2)
    e_k = _energies(facts, theta, k_var) + constant
    share = np.zeros(e_q.shape[1])
    share[: len(theta)] = np.abs(anchor_phase(theta, facts.info.n_ctx_train or 0)) ** 2 if len(theta) else 0.0
    share[len(theta) :] = 1.0
    left = np.maximum(e_k - constant * share, 0.0)
    dim = layer.dim_k
    plain = float((np.sqrt(e_q.sum(axis=1) * e_k.sum(axis=1)) / dim).max())
    anchored = float((np.sqrt(e_q * left).sum(axis=1) / dim).max())
    return Noise(layer.index, bias, taken, plain, anchored)


def _energies(facts: Facts, theta: Array, squares: Array) -> Array:
    """[KV head, pairs and then coordinates that do not turn], sums of `squares` [KV head, dim]."""
    pairs = len(theta)
    turning = squares[:, : 2 * pairs]
    if facts.info.arch in NEIGHBOURS:
        both = turning[:, 0::2] + turning[:, 1::2]
    else:
        both = turning[:, :pairs] + turning[:, pairs:]
    return np.concatenate([both, squares[:, 2 * pairs :]], axis=1)


def _constant(facts: Facts, theta: Array, mean: Array, ctx: int) -> tuple[float, float]:
    energy = _energies(facts, theta, mean**2)
    total = float(energy.sum())
    if total == 0:
        return 0.0, float("nan")
    share = np.ones(energy.shape[1])
    if len(theta):
        share[: len(theta)] = taken_share(theta, ctx, facts.info.n_ctx_train or 0)
    return float(np.sqrt(energy.max())), float((energy * share).sum() / total)


def _biases(facts: Facts, layer: Layer) -> tuple[Array | None, Array | None]:
    """Of Q and K: [heads·dim] and [KV heads·dim]."""
    if facts.info.arch in WITHOUT_BIAS:
        return None, None
    n_q, n_k = layer.heads * layer.dim_k, layer.kv_heads * layer.dim_k
    prefix = f"blk.{layer.index}."
    if layer.fused:
        both = facts.tensor(prefix + "attn_qkv.bias")
        fits = both is not None and both.size >= n_q + n_k
        return (both[:n_q], both[n_q : n_q + n_k]) if both is not None and fits else (None, None)
    q, k = facts.tensor(prefix + "attn_q.bias"), facts.tensor(prefix + "attn_k.bias")
    return (
        q if q is not None and q.shape == (n_q,) else None,
        k if k is not None and k.shape == (n_k,) else None,
    )


def _projections(facts: Facts, layer: Layer) -> tuple[Array, Array] | None:
    """Variance of Q and K by coordinate; None: the tensors have another shape or type."""
    prefix = f"blk.{layer.index}."
    n_q, n_k, n_embd = layer.heads * layer.dim_k, layer.kv_heads * layer.dim_k, facts.info.n_embd
    gain = facts.tensor(prefix + "attn_norm.weight")
    if gain is None or gain.shape != (n_embd,):
        gain = np.ones(n_embd)
    if layer.fused:
        both = facts.tensor(prefix + "attn_qkv.weight")
        if both is None or both.ndim != 2 or both.shape[1] != n_embd or len(both) < n_q + n_k:
            return None
        q, k = both[:n_q], both[n_q : n_q + n_k]
    else:
        wq, wk = facts.tensor(prefix + "attn_q.weight"), facts.tensor(prefix + "attn_k.weight")
        if wq is None or wk is None:
            return None
        q, k = wq, wk
        if q.shape == (2 * n_q, n_embd):  # each head is followed by a gate of its size
            q = q.reshape(layer.heads, 2, layer.dim_k, n_embd)[:, 0].reshape(n_q, n_embd)
    if q.shape != (n_q, n_embd) or k.shape != (n_k, n_embd):
        return None
    return ((q * gain) ** 2).sum(axis=1), ((k * gain) ** 2).sum(axis=1)


def _normed(facts: Facts, layer: Layer, name: str, squares: Array) -> Array:
    """Mean squares behind a norm: unit rms times the weight, by head or over all heads."""
    weight = facts.tensor(f"blk.{layer.index}.{name}.weight")
    if weight is None or squares.size % weight.size:
        return squares
    rows = squares.reshape(-1, weight.size)
    means = rows.mean(axis=1, keepdims=True)
    flat: Array = (rows / np.where(means > 0, means, 1.0) * weight.reshape(-1) ** 2).reshape(-1)
    return flat
