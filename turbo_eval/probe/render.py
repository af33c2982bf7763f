"""A probe for a terminal, an issue, or as a plot over layers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from turbo_eval.probe import LayerDifference, Probed
from turbo_eval.probe.steps import Judged

COLUMNS = (
    *("layer", "Q", "K", "V", "attention", "residual", "cosine"),
    *("K noise", "explained", "K cost", "V noise", "explained", "scores KLD", "kernel"),
)
LEGEND = (
    "Q … residual: relative error of B against A (of what varies over the tokens). K, V noise: B's cache"
    " against what was written to it, squared and relative; explained: the same for the type's reference"
    " encoder. K cost: K noise over the part of K that varies, 1 = as on Gaussians. scores KLD: attention"
    " weights with cached against written K, nats. kernel: NMSE of B's attention against attention over the"
    " cache it read."
)


def _row(difference: LayerDifference, judged: Judged) -> list[str]:
    d, j = difference, judged
    errors = (f"{x:.2g}" for x in (d.q, d.k, d.v, d.attn_out, d.l_out))
    noise = (f"{x:.2g}" for x in (j.k_noise, j.k_reference, j.k_excess, j.v_noise, j.v_reference))
    return [str(d.layer), *errors, f"{d.cosine:.5f}", *noise, f"{j.scores_kld:.2g}", f"{j.fa_nmse:.1g}"]


def conclusion(result: Probed) -> list[str]:
    """Sentences: the first cause of each side, and how far the answers part."""
    lines = [
        f"Next-token distributions over {result.tokens} tokens: KL divergence {result.kld:.5f} nats,"
        f" same top {100 * result.same_top:.1f} %."
    ]
    for name, findings in (("A", result.findings_a), ("B", result.findings_b)):
        if findings:
            first = findings[0]
            kind = "Costly" if first.costly else "First wrong"
            lines.append(f"{kind} in {name}: {first.sentence()}.")
            further = [f for f in findings[1:] if f.costly == first.costly]
            if further:
                layers = sorted({f.layer for f in further})
                shown = ", ".join(map(str, layers[:12])) + (" …" if len(layers) > 12 else "")
                lines.append(f"The same kind of finding in {name} at layers {shown}.")
    if not result.faulty:
        lines.append("Every step follows from the one before it, within what the types cost.")
    same = [d for d in result.differences if d.same_k is not None or d.same_v is not None]
    if same and (result.a.k, result.a.v, result.a.profile) == (result.b.k, result.b.v, result.b.profile):
        first_other = next((d.layer for d in same if d.same_k != 1 or d.same_v != 1), None)
        lines.append(
            "All cache bytes are the same on both sides."
            if first_other is None
            else f"Cache bytes are the same up to layer {first_other}, where {_bytes(same, first_other)}."
        )
    return lines


def _bytes(same: list[LayerDifference], layer: int) -> str:
    found = next(d for d in same if d.layer == layer)
    shares = ((n, s) for n, s in (("K", found.same_k), ("V", found.same_v)) if s is not None)
    return ", ".join(f"{100 * share:.2f} % of {name}'s agree" for name, share in shares)


def render_markdown(result: Probed) -> str:
    """Fit for an issue."""
    rows = [_row(d, j) for d, j in zip(result.differences, result.judged_b, strict=True)]
    text = [f"**A** = `{result.a.text}`, **B** = `{result.b.text}`", "", *conclusion(result), ""]
    text += ["| " + " | ".join(COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
    text += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*text, "", LEGEND]) + "\n"


def render_json(result: Probed) -> str:
    """Everything, for scripts."""
    return json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n"


def plot(result: Probed, path: Path) -> None:
    """Errors over layers: B against A above, the cache's own below, layers with findings marked."""
    import matplotlib  # noqa: PLC0415 half a second, for figures alone

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 after the choice of its backend

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    layers = [d.layer for d in result.differences]
    for name, label in (
        *(("q", "Q"), ("k", "K"), ("v", "V")),
        *(("attn_out", "attention output"), ("l_out", "residual stream")),
    ):
        upper.semilogy(layers, [getattr(d, name) for d in result.differences], label=label, marker=".")
    for name, label, style in (
        ("k_noise", "K cache", "C0-"),
        ("k_reference", "K, explained by the type", "C0:"),
        ("v_noise", "V cache", "C1-"),
        ("v_reference", "V, explained by the type", "C1:"),
        ("fa_nmse", "attention kernel", "C2-"),
        ("scores_kld", "scores, KLD (nats)", "C3-"),
    ):
        values = [max(getattr(j, name), 1e-12) for j in result.judged_b]
        lower.semilogy(layers, values, style, label=label)
    for axis in (upper, lower):
        for finding in {f.layer: f for f in reversed(result.findings_b)}.values():
            axis.axvspan(finding.layer - 0.5, finding.layer + 0.5, color="red", alpha=0.12)
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    upper.set_ylabel("relative error, B against A")
    lower.set_ylabel("squared relative error within B")
    lower.set_xlabel("layer")
    upper.set_title(f"A: {result.a.text}\nB: {result.b.text}", fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
