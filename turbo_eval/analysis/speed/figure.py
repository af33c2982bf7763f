"""Speed against depth, number of sequences or length of draft, and its ratio to f16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from turbo_eval.analysis.figures import INK, MARKS, SERIES
from turbo_eval.bench.quality import pair_label
from turbo_eval.records.speed import WORKLOADS, BenchRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Panel:
    """A column of the figure. `across`: the field of a row on the x axis; `speed`: "prefill" or "decode"."""

    title: str
    label: str
    across: str
    speed: str
    records: tuple[BenchRecord, ...]


def _panels(measured: Sequence[BenchRecord]) -> Iterator[_Panel]:
    for workload in WORKLOADS:
        own = tuple(r for r in measured if r.workload == workload)
        if not own:
            continue
        if workload == "depth":
            yield _Panel("prefill", "depth [tokens]", "depth", "prefill", own)
            yield _Panel("decode", "depth [tokens]", "depth", "decode", own)
        elif workload == "parallel":
            yield _Panel("prompts, all sequences", "sequences at once", "size", "prefill", own)
            yield _Panel("new tokens, all sequences", "sequences at once", "size", "decode", own)
        else:
            for depth in sorted({r.depth for r in own}):
                here = tuple(r for r in own if r.depth == depth)
                yield _Panel(f"drafts at depth {depth}", "tokens of a draft", "size", "decode", here)


def speed_figure(records: Sequence[BenchRecord]) -> Figure:
    """Tokens/s (above) and ratio to f16 of the same rounds (below)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 as below
    from matplotlib.figure import Figure  # noqa: PLC0415 matplotlib takes half a second

    measured = [r for r in records if r.status == "ok"]
    panels = list(_panels(measured)) or [_Panel("nothing was measured", "", "depth", "decode", ())]
    figure = Figure(figsize=(4.5 * max(2, len(panels)), 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(panels), sharex="col", squeeze=False)
    for column, panel in enumerate(panels):
        above, below = grid[0][column], grid[1][column]
        _draw(panel, measured, above, below)
        above.set_title(panel.title, color=INK)
        below.set_xlabel(panel.label, color=INK)
        below.axhline(1, color=INK, linewidth=0.6)
        if panel.across == "size":
            _by_doubling(below, sorted({r.size for r in panel.records}))
    grid[0][0].set_ylabel("tokens/s", color=INK)
    grid[1][0].set_ylabel("× f16", color=INK)
    for axes in grid.flat:
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    if measured:
        drawn = {
            label: line
            for axes in grid[0]
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend = figure.legend(
            drawn.values(), drawn, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False
        )
        for text in legend.get_texts():
            text.set_color(INK)
    return figure


def _draw(panel: _Panel, measured: Sequence[BenchRecord], above: Any, below: Any) -> None:
    labels = {id(r): pair_label(r, measured) for r in panel.records}
    every = dict.fromkeys(pair_label(r, measured) for r in measured)
    looks = dict(zip(every, zip(cycle(SERIES), cycle(MARKS)), strict=False))
    for label in dict.fromkeys(labels.values()):
        colour, mark = looks[label]
        rows = [r.row() for r in panel.records if labels[id(r)] == label]
        for axes, field in ((above, f"{panel.speed}_median"), (below, f"{panel.speed}_ratio")):
            points = sorted((row[panel.across], row[field]) for row in rows if row[field] is not None)
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "-", marker=mark, markersize=4, color=colour, label=label)


def _by_doubling(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
