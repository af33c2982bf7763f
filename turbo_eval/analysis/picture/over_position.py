"""KL divergence over the place in the context, a line for each pair: does damage grow as the cache fills?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo_eval.analysis.figures import INK, MARKS, SERIES, axes_of
from turbo_eval.analysis.picture.front import number_axis
from turbo_eval.analysis.summary import Summary
from turbo_eval.errors import IncompleteError
from turbo_eval.evidence.position import Span, over_position
from turbo_eval.evidence.tokens import Tokens, load
from turbo_eval.records.record import Record
from turbo_eval.records.store import warn_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPANS = 8


@dataclass(frozen=True)
class Line:
    """A pair's spans, from the first scored token to the last. `row` is its number in the table, from 0."""

    name: str
    row: int
    spans: tuple[Span, ...]


def lines(rows: Sequence[Summary], folders: Sequence[Path]) -> list[Line]:
    """The quantized pairs of a setting whose figures of each token lie beside their records.

    Args:
        folders: where the records were read from; files of tokens are named relative to these.
    """
    found = []
    for number, row in enumerate(rows):
        if row.status != "ok" or row.is_reference or row.bpv >= 16:
            continue
        tokens = _tokens(row.records, folders)
        if tokens is not None and tokens.kld.shape[1] >= SPANS:
            found.append(Line(row.name, number, tuple(over_position(tokens, row.ctx, SPANS))))
    return found


def _tokens(records: Sequence[Record], folders: Sequence[Path]) -> Tokens | None:
    """Of the first record that has them; a warning where a file is there and is another one."""
    for record in records:
        if record.tokens is None or not record.ok or record.cell.metric not in ("kld", "ppl"):
            continue
        problem = ""
        for path in (folder / record.tokens.file for folder in folders):
            if path.is_file():
                try:
                    return load(path, record.tokens.sha256)
                except IncompleteError as error:  # two machines may have a file of one name
                    problem = error.message
        if problem:
            warn_once(f"{problem}; it is left out of the figure over positions")
    return None


def draw(found: Sequence[Line], *, prefix: str = "", width: float = 7.5, height: float = 4.2) -> Figure:
    """Means with 95 % intervals over chunks. Size in inches.

    Args:
        found: one line at least.
        prefix: of the ids on a page: a name in the legend is a link to "#PREFIXrN", the row of the table.
    """
    figure, axes = axes_of(width, height)
    every = [span.kld for line in found for span in line.spans]
    least = min(x.value for x in every)
    for line, colour, mark in zip(found, cycle(SERIES), cycle(MARKS), strict=False):
        at = [(span.first + span.last) / 2 for span in line.spans]
        klds = [span.kld for span in line.spans]
        axes.plot(at, [x.value for x in klds], "-", marker=mark, markersize=4, color=colour, label=line.name)
        if klds[0].chunks > 1:
            low = [max(x.low, least / 3) if least > 0 else x.low for x in klds]
            axes.fill_between(at, low, [x.high for x in klds], color=colour, alpha=0.12, linewidth=0)
    spread = [x.high for x in every if x.chunks > 1]
    number_axis(axes, least, max([x.value for x in every] + spread), logarithmic=least > 0)
    axes.set_xlabel("tokens before, in the same chunk")
    axes.set_ylabel("KL divergence from f16/f16, nats")
    _legend(figure, found, prefix)
    return figure


def _legend(figure: Any, found: Sequence[Line], prefix: str) -> None:
    legend = figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    for text, line in zip(legend.get_texts(), found, strict=True):
        text.set_color(INK)
        if prefix:
            text.set_url(f"#{prefix}r{line.row}")


def as_table(found: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The figure's numbers: a column for each pair, a line for each span."""
    columns = ["tokens before", *(line.name for line in found)]
    spans = zip(*(line.spans for line in found), strict=True)
    return columns, [[f"{at[0].first} – {at[0].last}", *map(_words, at)] for at in spans]


def _words(span: Span) -> str:
    """ "0.0123 (0.0101 … 0.0145)"; with one chunk there is no interval."""
    kld = span.kld
    interval = f" ({kld.low:z.4f} … {kld.high:z.4f})" if kld.chunks > 1 else ""
    return f"{kld.value:z.4f}{interval}"


def said(found: Sequence[Line]) -> str:
    """What is drawn, in a sentence for each pair."""
    ends = ((line.name, line.spans[0].kld.value, line.spans[-1].kld.value) for line in found)
    return "; ".join(f"{name}: {first:.3g} at first, {last:.3g} at last" for name, first, last in ends)
