"""The front as bars of text, for the end of a sweep on a terminal."""

from __future__ import annotations

import math

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from turbo_eval.analysis.picture.points import Front

_BARS = 30
_DECADES = 4.0  # a bar is empty where a loss is this many powers of ten below the largest


def bars(front: Front) -> Table:
    """A line for each pair, from few bits to many; the bar is the loss, "●" is on the front.

    KL divergences differ by powers of ten, so their bars are logarithmic; ΔPPL's are linear, and a loss below
    zero has none.
    """
    table = Table(title=f"{front.unit}, by size", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("K/V")
    table.add_column("bits", justify="right")
    table.add_column("")
    table.add_column("", justify="right")
    top = max(max(p.loss for p in front.points), 1e-12)
    for point in front.points:
        share = max(0.0, point.loss) / top
        if front.of == "kld":
            share = max(0.0, 1 + math.log10(share) / _DECADES) if share > 0 else 0.0
        error = f" ± {point.error:.2g}" if point.error else ""
        number = f"{point.loss:.4f}" if front.of == "kld" else f"{point.loss:+.2f}"
        style = None if point.front else "dim"
        bar = Bar(1, 0, share, width=_BARS, color="blue" if point.front else "bright_black")
        mark = Text("●" if point.front else " ")
        table.add_row(mark, point.name, f"{point.bits:.2f}", bar, number + error, style=style)
    if front.destroyed:
        table.caption = f"Not drawn, perplexity more than doubled: {', '.join(front.destroyed)}"
        table.caption_justify = "left"
    return table
