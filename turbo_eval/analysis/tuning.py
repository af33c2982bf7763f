"""The figure of `tune`: what the best allocations would cost over bits per value, and what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbo_eval.analysis.figures import INK, axes_of
from turbo_eval.tune.run import Tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tuning_figure(done: Tuned) -> Figure:
    """Mean KL divergence on text that was held out over bits per value; the predicted front as a line."""
    figure, axes = axes_of(7, 4.2)
    bits, klds = zip(*done.front, strict=True)
    axes.plot(bits, klds, "-", color="#2563eb", linewidth=1, alpha=0.7, label="predicted")
    for number, row in enumerate(done.rows):
        mark, colour = ("o", "#2563eb") if number == 0 else ("x", "#9a6700")
        axes.errorbar(row.bits, row.kld.mean, yerr=row.kld.error, fmt=mark, color=colour)
        place = (row.bits, row.kld.mean)
        axes.annotate(row.name, place, (4, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence from f16/f16 [nats]")
    axes.set_xlabel("bits per value, window not counted")
    axes.margins(x=0.12, y=0.15)
    return figure
