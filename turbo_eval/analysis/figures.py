"""Figures of the report: quality against bits, K × V heatmaps; what all figures share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo_eval.analysis.summary import Summary
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.tune.run import Tuned
from turbo_eval.util.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stands for the text colour of the page; `inline_svg` replaces it, so that figures follow dark mode.
INK = "#123457"
# The same with the colours of points and lines; the page's style sheet has another shade for dark mode.
BLUE, AMBER, GREEN, GREY = "#2563eb", "#b45309", "#15803d", "#6b7280"
PURPLE, RED = "#7c3aed", "#be123c"
# Of lines that have no colour of their own; marks as many as have no divisor in common with the colours.
SERIES = (BLUE, AMBER, GREEN, PURPLE, RED, GREY)
MARKS = ("o", "s", "^", "D", "v", "P", "X")
_NAMES = {"blue": BLUE, "amber": AMBER, "green": GREEN, "purple": PURPLE, "red": RED, "grey": GREY}
_OF_THE_PAGE = {INK: "currentColor"} | {colour: f"var(--{name})" for name, colour in _NAMES.items()}


# Perplexity more than doubled: no size makes up for that.
UNUSABLE_PCT = 100.0


def usable(row: Summary) -> bool:
    """Measured, and not destroyed."""
    return row.status == "ok" and (row.delta_pct is None or row.delta_pct <= UNUSABLE_PCT)


def losses(rows: Sequence[Summary]) -> tuple[list[tuple[Summary, float]], str]:
    """Each measured row with its quality loss, and the loss's name: mean KLD if all that have a figure have
    it, else ΔPPL in percent, which is negative where the perplexity fell. Only the reference has none."""
    compared = [r for r in rows if r.status == "ok" and not r.is_reference]
    with_kld = [(r, r.get("kld")) for r in compared]
    klds = [(r, found.kld.mean) for r, found in with_kld if found is not None and found.kld is not None]
    deltas = [(r, r.delta_pct) for r in compared if r.delta_pct is not None]
    if len(klds) >= max(1, len(deltas)):
        return klds, "KL divergence from f16/f16 [nats]"
    against = compared[0].against if compared else ""
    return deltas, f"ΔPPL against {against} [%]"


def axes_of(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 as below
    from matplotlib.figure import Figure  # noqa: PLC0415 matplotlib takes half a second

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    return figure, axes


def tuning_figure(done: Tuned) -> Figure:
    """Mean KL divergence on text that was held out over bits per value; the predicted front as a line."""
    figure, axes = axes_of(7, 4.2)
    bits, klds = zip(*done.front, strict=True)
    axes.plot(bits, klds, "-", color=BLUE, linewidth=1, alpha=0.7, label="predicted")
    for number, row in enumerate(done.rows):
        mark, colour = ("o", BLUE) if number == 0 else ("x", AMBER)
        axes.errorbar(row.bits, row.kld.mean, yerr=row.kld.error, fmt=mark, color=colour)
        place = (row.bits, row.kld.mean)
        axes.annotate(row.name, place, (4, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence from f16/f16 [nats]")
    axes.set_xlabel("bits per value, window not counted")
    axes.margins(x=0.12, y=0.15)
    return figure


def heatmap_figure(rows: Sequence[Summary], value: str) -> Figure | None:
    """K × V matrix of "kld" or "delta_pct"; None with fewer than two numbers."""
    cells = {(r.k, r.v): x for r in rows if r.profile is None and (x := heat_value(r, value)) is not None}
    if len(cells) < 2:
        return None
    names = sorted({t for pair in cells for t in pair}, key=lambda t: -cache_type(t).bpv)
    ks, vs = (
        [n for n in names if any(k == n for k, _ in cells)],
        [n for n in names if any(v == n for _, v in cells)],
    )
    figure, axes = axes_of(1.6 + 0.9 * len(vs), 1.2 + 0.55 * len(ks))
    grid = [[cells.get((k, v), float("nan")) for v in vs] for k in ks]
    shown = [[level(x, value) for x in line] for line in grid]
    axes.imshow(shown, cmap="YlOrRd", vmin=0, vmax=LEVELS, aspect="auto")
    for y, line in enumerate(grid):
        for x, number in enumerate(line):
            if number == number:
                axes.text(x, y, f"{number:.3g}", ha="center", va="center", fontsize=8, color="#111111")
    axes.set_xticks(range(len(vs)), vs)
    axes.set_yticks(range(len(ks)), ks)
    axes.set_xlabel("V")
    axes.set_ylabel("K")
    return figure


LEVELS = 6
_STEPS = {"kld": (0.002, 0.01, 0.03, 0.1, 0.5), "delta_pct": (0.3, 1, 3, 10, 50)}


def level(number: float, value: str) -> float:
    """0 (no loss) to 5 (destroyed); nan stays nan. The steps are of "kld" in nats, ΔPPL in percent."""
    if number != number:
        return number
    return float(sum(number > step for step in _STEPS[value]))


def heat_value(row: Summary, value: str) -> float | None:
    """The row's mean KLD or ΔPPL %."""
    if row.status != "ok":
        return None
    if value == "delta_pct":
        return row.delta_pct
    record = row.get("kld")
    return record.kld.mean if record is not None and record.kld is not None else None


def inline_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element whose ink is the page's text colour."""
    import matplotlib  # noqa: PLC0415 half a second, for figures alone

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "turbo-eval"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(' target="_blank"', "")  # its links lead to rows of the same page
    for colour, name in _OF_THE_PAGE.items():
        svg = svg.replace(colour, name)
    role = "group" if "<a " in svg else "img"  # what is an image has no links in it
    return svg.replace("<svg", f'<svg role="{role}" aria-label="{label}"', 1)


def save(figure: Figure, path: Path, description: str = "") -> None:
    """Write the figure as .svg or .png on white, with what it shows in words for those who can't see it.

    Raises:
        UsageError: another suffix.
    """
    import matplotlib  # noqa: PLC0415 half a second, for figures alone

    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"{path} ends in neither .svg nor .png", "choose one of them")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"Description": description} if description else {}
        date = {"Date": None} if path.suffix == ".svg" else {}  # the same figure is the same file
        with matplotlib.rc_context({"svg.hashsalt": "turbo-eval"}):
            figure.savefig(path, facecolor="white", dpi=150, metadata={**told, **date})
