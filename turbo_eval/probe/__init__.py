"""Two configurations over the same tokens, layer by layer: where does it first go wrong?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbo_eval.errors import UsageError
from turbo_eval.probe.dump import Dump, Layer, Setup, read, take
from turbo_eval.probe.steps import Finding, Judged, judge

__all__ = ["LayerDifference", "Probed", "Setup", "compare", "read", "take"]

# Sides with the same types share every rounding but the order of sums: more than this is a fault.
SAME_TYPES_LIMIT = 0.05


@dataclass(frozen=True)
class LayerDifference:
    """B against A in one layer: relative errors of Q, K and V as the model makes them, of the attention's
    output and of the residual stream, and the latter's cosine. `same_k`, `same_v`: share of cache
    bytes that are equal, None where the types differ."""

    layer: int
    q: float
    k: float
    v: float
    attn_out: float
    l_out: float
    cosine: float
    same_k: float | None
    same_v: float | None


@dataclass(frozen=True)
class Probed:
    """What `compare` found; `judged_*` and `differences` by layer, `findings_*` first cause first.

    `kld` is the mean KL divergence of B's next-token distributions from A's in nats, `same_top` the
    share of tokens with the same most likely successor.
    """

    a: Setup
    b: Setup
    tokens: int
    judged_a: tuple[Judged, ...]
    judged_b: tuple[Judged, ...]
    differences: tuple[LayerDifference, ...]
    findings_a: tuple[Finding, ...]
    findings_b: tuple[Finding, ...]
    kld: float
    same_top: float

    @property
    def faulty(self) -> bool:
        return bool(self.findings_a or self.findings_b)


def compare(a: Dump, b: Dump) -> Probed:
    """Judge every layer of both sides on its own, then B against A.

    Raises:
        UsageError: the sides saw other tokens or have other layers.
    """
    if not np.array_equal(a.tokens, b.tokens) or a.layers.keys() != b.layers.keys():
        raise UsageError("the two sides saw other tokens or layers", "probe one model and text with both")
    judged_a, judged_b = (tuple(judge(layer) for layer in side.layers.values()) for side in (a, b))
    differences = tuple(_difference(a.layers[n], b.layers[n]) for n in a.layers)
    findings_a = _ordered(judged_a)
    findings_b = _ordered(judged_b)
    if not findings_a and not findings_b:
        findings_b = _unexplained(a, b, differences)
    return Probed(
        a=a.setup,
        b=b.setup,
        tokens=len(a.tokens),
        judged_a=judged_a,
        judged_b=judged_b,
        differences=differences,
        findings_a=findings_a,
        findings_b=findings_b,
        kld=_kld(a.logits, b.logits),
        same_top=float((a.logits.argmax(axis=1) == b.logits.argmax(axis=1)).mean()),
    )


def _ordered(judged: tuple[Judged, ...]) -> tuple[Finding, ...]:
    """Broken steps before types that don't suit, then by layer: a fault explains more than a cost."""
    found = [finding for layer in judged for finding in layer.findings]
    return tuple(sorted(found, key=lambda f: (f.costly, f.layer, f.order)))


def _unexplained(a: Dump, b: Dump, differences: tuple[LayerDifference, ...]) -> tuple[Finding, ...]:
    """Sides of the same types whose every cache step is right, and which still part: it is elsewhere."""
    types = {(layer.type_k, layer.type_v) for side in (a, b) for layer in side.layers.values()}
    if len(types) > 1:
        return ()
    for number, difference in enumerate(differences):
        before = differences[number - 1].l_out if number else 0.0
        for order, name in enumerate(("q", "k", "v", "l_out")):
            error = getattr(difference, name)
            if error > SAME_TYPES_LIMIT and error > 3 * before:
                tensor = "residual stream" if name == "l_out" else name.upper()
                detail = (
                    f"parts by {error:.2g} from the other side, though the layer before agrees to"
                    f" {before:.2g} and every step of the cache follows: a kernel outside attention"
                )
                return (Finding(difference.layer, order, tensor, detail),)
    return ()


def _difference(a: Layer, b: Layer) -> LayerDifference:
    x, y = a.l_out.astype(np.float64), b.l_out.astype(np.float64)
    cosine = (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return LayerDifference(
        layer=a.number,
        q=_relative(b.q, a.q),
        k=_relative(b.k, a.k),
        v=_relative(b.v, a.v),
        attn_out=_relative(b.attn_out, a.attn_out),
        l_out=_relative(b.l_out, a.l_out),
        cosine=float(cosine.mean()),
        same_k=float((a.k_cache == b.k_cache).mean()) if a.type_k == b.type_k else None,
        same_v=float((a.v_cache == b.v_cache).mean()) if a.type_v == b.type_v else None,
    )


def _relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Relative error of what varies over the tokens: a constant part would hide the rest."""
    x, y = (side.astype(np.float64) for side in (want, got))
    varying = ((x - x.mean(axis=0)) ** 2).sum()
    return float(np.sqrt(((y - x) ** 2).sum() / max(float(varying), 1e-300)))


def _kld(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    p, q = (_log_softmax(x) for x in (a, b))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    out: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return out
