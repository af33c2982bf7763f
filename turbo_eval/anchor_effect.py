"""What the K anchor does, from the records: perplexity and KL divergence by pair, off and on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from turbo_eval.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Effect:
    """One pair in one setting. KLD in nats from f16/f16 without anchor; None: not on record.

    `k_bits` are the bits per K value with the anchor on (types may differ by layer).
    """

    model: str
    ctx: int
    chunks: int
    k: str
    v: str
    k_bits: float
    ppl_base: float | None
    ppl_off: float | None
    ppl_on: float | None
    kld_off: float | None
    kld_on: float | None


def effects(records: Sequence[Record], on: str = "auto") -> list[Effect]:
    """Pair up KL-divergence records that differ in the anchor alone.

    Args:
        on: the anchor that counts as on, as asked for: "auto", "on" or a file.
    """
    groups: dict[tuple[str, int, int, str, str, str], dict[str, Record]] = {}
    for record in records:
        cell = record.cell
        if record.ok and cell.metric == "kld" and record.kld is not None and cell.anchor in ("off", on):
            key = (record.machine, cell.ctx, cell.chunks, cell.model, cell.k, cell.v)
            groups.setdefault(key, {})[cell.anchor] = record  # later ones on record replace earlier
    found = []
    for (_, ctx, chunks, model, k, v), states in groups.items():
        off, held = states.get("off"), states.get(on)
        some = held or off
        assert some is not None and some.kld is not None
        found.append(
            Effect(
                model=model,
                ctx=ctx,
                chunks=chunks,
                k=k,
                v=v,
                k_bits=some.bpv_k,
                ppl_base=some.kld.ppl_base,
                ppl_off=off.ppl if off else None,
                ppl_on=held.ppl if held else None,
                kld_off=off.kld.mean if off and off.kld else None,
                kld_on=held.kld.mean if held and held.kld else None,
            )
        )
    return sorted(found, key=lambda e: (e.model, e.ctx, -e.k_bits, e.v))


def table(found: Sequence[Effect]) -> str:
    """Markdown, one row a pair."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [
        "| model | context × chunks | K/V | bits per K value"
        " | PPL f16 | PPL off | PPL on | KLD off | KLD on |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for e in found:
        lines.append(
            f"| {e.model} | {e.ctx} × {e.chunks} | {e.k}/{e.v} | {e.k_bits:.2f} | {number(e.ppl_base, '.3f')}"
            f" | {number(e.ppl_off, '.5g')} | {number(e.ppl_on, '.3f')}"
            f" | {number(e.kld_off, '.4f')} | {number(e.kld_on, '.4f')} |"
        )
    return "\n".join(lines)


def plot(found: Sequence[Effect]) -> Figure:
    """Two panels, logarithmic: PPL over that of f16, and KLD; off and on side by side by pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * len(found) + 2), 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = np.arange(len(found))
    nothing = float("nan")
    series = {
        "anchor off": (
            [_ratio(e.ppl_off, e.ppl_base) for e in found],
            [e.kld_off or nothing for e in found],
            -0.2,
        ),
        "anchor on": (
            [_ratio(e.ppl_on, e.ppl_base) for e in found],
            [e.kld_on or nothing for e in found],
            0.2,
        ),
    }
    for name, (ratios, klds, shift) in series.items():
        upper.bar(at + shift, ratios, 0.38, label=name, bottom=1.0)
        lower.bar(at + shift, klds, 0.38, label=name)
    upper.set_yscale("log")
    lower.set_yscale("log")
    upper.set_ylabel("PPL / PPL of f16")
    lower.set_ylabel("mean KLD from f16 (nats)")
    upper.legend()
    lower.set_xticks(at, [f"{e.model}\n{e.k}/{e.v}" for e in found], rotation=60, ha="right", fontsize=8)
    return figure


def _ratio(ppl: float | None, base: float | None) -> float:
    """Height of a bar that starts at 1."""
    return ppl / base - 1.0 if ppl and base else float("nan")
