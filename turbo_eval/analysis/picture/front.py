"""The front drawn: loss over bits per value, with error bars, readable axes and labels that don't collide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from turbo_eval.analysis.figures import AMBER, BLUE, GREEN, GREY, INK, axes_of
from turbo_eval.analysis.picture.points import Front, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"alone": AMBER, "window": BLUE, "profile": GREEN}
_MARKS = {"alone": "o", "window": "o", "profile": "D"}
_WORDS = {
    "alone": "cache alone",
    "window": "newest and first tokens kept exact",
    "profile": "KV profile: types by layer",
}
_MANY = 20.0  # ΔPPL in percent up to which the axis stays linear


def draw(front: Front, *, prefix: str = "", width: float = 7.5, height: float = 4.6) -> Figure:
    """The picture of a setting. Size in inches.

    Args:
        prefix: of the ids on a page: a name is a link to "#PREFIXrN", the row of the table; "": no links.
    """
    figure, axes = axes_of(width, height)
    for kind, words in _WORDS.items():
        if any(p.kind == kind and p.front for p in front.points):
            axes.plot([], [], _MARKS[kind], color=_COLOURS[kind], label=words)
    if any(not p.front for p in front.points):
        axes.plot([], [], "o", color=GREY, mfc="none", label="another pair is smaller and better")
    _axes(axes, front)
    best = front.best()
    axes.plot([p.bits for p in best], [p.loss for p in best], "-", color=INK, linewidth=0.8, alpha=0.5)
    for point in front.points:
        _point(axes, point)
    legend = axes.legend(fontsize=8.5, loc="upper right", framealpha=0)
    for text in legend.get_texts():
        text.set_color(INK)
    figure.draw_without_rendering()
    _label(axes, front, legend, prefix)
    return figure


def _axes(axes: Any, front: Front) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator  # noqa: PLC0415 matplotlib takes half a second

    low = min(p.loss - (p.error or 0) for p in front.points)
    high = max(p.loss + (p.error or 0) for p in front.points)
    if front.of == "delta" and high > _MANY:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_locator(FixedLocator([0, *_steps(1, high)]))
        axes.set_ylim(min(low, 0) - 0.5, high * 2)
        _readable(axes)
    else:
        number_axis(axes, low, high, logarithmic=front.of == "kld" and low > 0)
    if front.of == "delta":
        axes.axhline(0, color=INK, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.1)
    axes.set_xlabel(f"bits per value, mean of K and V, window counted, at {front.ctx} tokens")
    axes.set_ylabel(front.unit)


def number_axis(axes: Any, low: float, high: float, *, logarithmic: bool) -> None:
    """A vertical axis for `low` to `high` whose ticks are plain numbers, and few."""
    from matplotlib.ticker import FixedLocator, MaxNLocator  # noqa: PLC0415 matplotlib takes half a second

    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(_steps(low, high)))
        axes.set_ylim(low / 1.6, high * 1.9)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.margins(y=0.18)
    _readable(axes)


def _readable(axes: Any) -> None:
    """Plain numbers, a light grid, no frame."""
    from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: PLC0415 matplotlib takes half a second

    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plain(number: float, _: object) -> str:
    return f"{number:.12g}".replace("-", "−")


def _steps(low: float, high: float) -> list[float]:
    """1, 2, 5 times a power of ten where that makes few ticks, else powers of ten; around low … high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [float(f"{f}e{n}") for n in range(first, last + 1) for f in factors]
    return [x for x in found if low / 2 <= x <= high * 2]


def _point(axes: Any, point: Point) -> None:
    colour = _COLOURS[point.kind] if point.front else GREY
    axes.errorbar(
        point.bits,
        point.loss,
        yerr=point.error,
        fmt=_MARKS[point.kind],
        color=colour,
        mfc=colour if point.front else "none",
        markersize=6,
        elinewidth=1,
        capsize=2,
    )


_PLACES = [
    *((7, 5, "left", "bottom"), (7, -5, "left", "top"), (-7, 5, "right", "bottom"), (-7, -5, "right", "top")),
    *((0, 9, "center", "bottom"), (0, -9, "center", "top"), (12, 16, "left", "bottom")),
    *((12, -16, "left", "top"), (-12, 16, "right", "bottom"), (-12, -16, "right", "top")),
    *((16, 28, "left", "bottom"), (16, -28, "left", "top")),
]


def _label(axes: Any, front: Front, legend: Any, prefix: str) -> None:
    """Names beside the points, each where it covers no other name, no point and not the legend."""
    renderer = axes.figure.canvas.get_renderer()
    # boxes to stay clear of, in pixels
    taken = [legend.get_window_extent(renderer)]
    taken += [_bar(axes, p) for p in front.points]
    taken += [_box(x, y, 2) for x, y in _along(axes, front.best())]
    inside = axes.get_window_extent(renderer)
    for point in sorted(front.points, key=lambda p: not p.front):
        text = axes.annotate(
            point.pair,
            (point.bits, point.loss),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            alpha=1 if point.front else 0.8,
            url=f"#{prefix}r{point.row}" if prefix else None,
        )
        tried = []
        for place in _PLACES:
            _place(text, *place)
            box = text.get_window_extent(renderer)
            cost = sum(_overlap(box, other) for other in taken)
            cost += box.width * box.height - _overlap(box, inside)  # what would hang out
            tried.append((cost, place))
            if cost == 0:
                break
        _place(text, *min(tried)[1])
        taken.append(text.get_window_extent(renderer))


def _along(axes: Any, best: list[Point]) -> Iterator[tuple[float, float]]:
    """Places on the line of the front, in pixels, a few apart."""
    corners = [axes.transData.transform((p.bits, p.loss)) for p in best]
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 5))
        yield from ((x0 + (x1 - x0) * n / steps, y0 + (y1 - y0) * n / steps) for n in range(steps))


def _place(text: Any, x: float, y: float, horizontal: str, vertical: str) -> None:
    text.xyann = (x, y)
    text.set_horizontalalignment(horizontal)
    text.set_verticalalignment(vertical)


def _box(x: float, y: float, around: float = 4) -> Any:
    from matplotlib.transforms import Bbox  # noqa: PLC0415 matplotlib takes half a second

    return Bbox.from_extents(x - around, y - around, x + around, y + around)


def _bar(axes: Any, point: Point) -> Any:
    """A point with its error bar."""
    from matplotlib.transforms import Bbox  # noqa: PLC0415 matplotlib takes half a second

    error = point.error or 0
    x, low = axes.transData.transform((point.bits, max(point.loss - error, axes.get_ylim()[0])))
    _, high = axes.transData.transform((point.bits, point.loss + error))
    return Bbox.union([Bbox.from_extents(x - 3, low, x + 3, high), _box(x, (low + high) / 2)])


def _overlap(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0.0, width) * max(0.0, height))
