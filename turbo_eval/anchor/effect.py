"""What the K anchor does, from the records: perplexity and KL divergence by pair, off and on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from turbo_eval.records.record import Record

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
    exact: dict[tuple[str, int, int, str], float | None] = {}
    for record in records:
        cell = record.cell
        if record.ok and cell.metric == "kld" and record.kld is not None and cell.anchor in ("off", on):
            key = (record.machine, cell.ctx, cell.chunks, cell.model, cell.k, cell.v)
            groups.setdefault(key, {})[cell.anchor] = record  # later ones on record replace earlier
            if (cell.k, cell.v, cell.anchor) == ("f16", "f16", "off"):
                exact[key[:4]] = record.ppl
    found = []
    for (machine, ctx, chunks, model, k, v), states in groups.items():
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
                # the base logits are kept in 16 bits: what is computed from them is not quite the same
                ppl_base=exact.get((machine, ctx, chunks, model), some.kld.ppl_base),
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
    """PPL relative to f16's (above) and mean KLD (below), off and on: a column a model, logarithmic."""
    from matplotlib.figure import Figure  # noqa: PLC0415 matplotlib takes half a second

    found = [e for e in found if (e.k, e.v) != ("f16", "f16")]
    settings = list(dict.fromkeys((e.model, e.ctx, e.chunks) for e in found))
    width = max(6.0, 0.75 * len(found) + 1.5)
    figure = Figure(figsize=(width, 6.0), layout="constrained")
    counts = [sum((e.model, e.ctx, e.chunks) == s for e in found) for s in settings]
    grid = figure.subplots(
        2, len(settings), sharex="col", sharey="row", squeeze=False, width_ratios=counts or [1]
    )
    for column, setting in enumerate(settings):
        own = [e for e in found if (e.model, e.ctx, e.chunks) == setting]
        place = np.arange(len(own))
        for shift, label, state in ((-0.2, "anchor off", "off"), (0.2, "anchor on", "on")):
            ppl = [_ratio(getattr(e, f"ppl_{state}"), e.ppl_base) for e in own]
            kld = [getattr(e, f"kld_{state}") or np.nan for e in own]
            grid[0][column].bar(place + shift, ppl, 0.38, label=label)
            grid[1][column].bar(place + shift, kld, 0.38, label=label)
        grid[0][column].set_title(f"{setting[0]}, {setting[1]} × {setting[2]}", fontsize=10)
        grid[1][column].set_xticks(place, [f"{e.k}/{e.v}" for e in own], rotation=40, ha="right", fontsize=8)
        for axes in (grid[0][column], grid[1][column]):
            axes.set_yscale("log")
            axes.grid(axis="y", alpha=0.3)
    if settings:
        grid[0][0].set_ylabel("PPL / PPL of f16")
        grid[1][0].set_ylabel("mean KLD from f16 [nats]")
        grid[0][0].legend(fontsize=9)
    return figure


def _ratio(value: float | None, base: float | None) -> float:
    return value / base if value and base else float("nan")
