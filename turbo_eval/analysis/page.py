"""The report as a page and as markdown: what the templates are filled with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from turbo_eval.analysis import figures, table
from turbo_eval.analysis.picture import over_position
from turbo_eval.analysis.picture.front import draw
from turbo_eval.analysis.picture.points import front
from turbo_eval.analysis.speed import lines
from turbo_eval.analysis.speed.figure import speed_figure
from turbo_eval.analysis.summary import Summary, said_of_reference
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.records.record import Record
from turbo_eval.records.speed import BenchRecord

HEATS = (
    ("kld", "KL divergence from f16 [nats]", "{:z.4f}"),
    ("delta_pct", "ΔPPL [%]", "{:+.2f}"),
)


def environment() -> Environment:
    """Templates of this package; whatever goes into the page is escaped, markdown is not."""
    return Environment(
        loader=PackageLoader("turbo_eval.analysis", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class HeatCell:
    """`style` is the CSS class."""

    text: str
    style: str


def css() -> Markup:
    """Of the page; it is ours, so nothing in it is escaped."""
    return Markup(resources.files("turbo_eval.analysis").joinpath("report.css").read_text(encoding="utf-8"))


def script() -> Markup:
    """Of the page, as `css`."""
    return Markup(resources.files("turbo_eval.analysis").joinpath("report.js").read_text(encoding="utf-8"))


def setting(
    number: int, name: str, rows: Sequence[Summary], conclusion: list[str], folders: Sequence[Path]
) -> dict[str, Any]:
    """What the page shows of one setting; `number` counts them from 1, `folders` hold its records."""
    caption, columns, lines = table.for_people(table.to_frame(rows))
    found = front(rows)
    drawn = draw(found, prefix=f"s{number}") if found else None
    return {
        "name": name,
        "conclusion": conclusion,
        "reference": said_of_reference(rows),
        "caption": caption,
        "columns": columns,
        "lines": lines,
        "bad": [r.status != "ok" for r in rows],
        "heats": _heats(rows),
        "figure": Markup(figures.inline_svg(drawn, f"Loss against bits per value, {name}")) if drawn else "",
        "front": [point.name for point in found.best()] if found else [],
        "destroyed": found.destroyed if found else (),
        "position": _position(over_position.lines(rows, folders), f"s{number}", name),
    }


def _position(found: Sequence[over_position.Line], prefix: str, name: str) -> dict[str, Any] | None:
    """KL divergence over the place in the context, drawn and as a table; None: no figures of each token."""
    if not found:
        return None
    columns, lines = over_position.as_table(found)
    label = f"KL divergence over the position, {name}. {over_position.said(found)}"
    svg = figures.inline_svg(over_position.draw(found, prefix=prefix), label)
    return {"figure": Markup(svg), "columns": columns, "lines": lines}


def _heats(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    """K × V of each figure; where a pair was measured with several exact windows, for each of these."""
    pairs = _with_several(rows)
    windows = sorted({row.window for row in rows if (row.k, row.v) in pairs}, key=str)
    found = []
    for window in windows:
        # a pair with one row, which may never have a window, stands beside both
        own = [row for row in rows if row.window == window or (row.k, row.v) not in pairs]
        found += [_heat(own, value, f"{title}, window {window}", form) for value, title, form in HEATS]
    if not windows:
        found = [_heat(rows, *value) for value in HEATS]
    return [heat for heat in found if heat is not None]


def _with_several(rows: Sequence[Summary]) -> set[tuple[str, str]]:
    """Pairs that stand in more than one row."""
    counts = Counter((row.k, row.v) for row in rows)
    return {pair for pair, count in counts.items() if count > 1}


def _heat(rows: Sequence[Summary], value: str, title: str, form: str) -> dict[str, Any] | None:
    """K × V with a colour for the size of the loss; None with fewer than two numbers."""
    rows = [r for r in rows if r.profile is None]
    cells = {(r.k, r.v): r for r in rows}
    if sum(figures.heat_value(r, value) is not None for r in rows) < 2:
        return None
    order = sorted({t for pair in cells for t in pair}, key=lambda t: -cache_type(t).bpv)
    ks = [t for t in order if any(k == t for k, _ in cells)]
    vs = [t for t in order if any(v == t for _, v in cells)]

    def cell(row: Summary | None) -> HeatCell:
        number = figures.heat_value(row, value) if row else None
        if number is not None:
            return HeatCell(form.format(number), f"h{figures.level(number, value):.0f}")
        return HeatCell(row.status if row and row.status != "ok" else "·", "none")

    return {"title": title, "v": vs, "rows": [(k, [cell(cells.get((k, v))) for v in vs]) for k in ks]}


def speed(
    name: str, own: Sequence[BenchRecord], records: Sequence[Record], *, drawn: bool = False
) -> dict[str, Any]:
    """What the page shows of one model's speed under one kind of load; markdown does without the figure."""
    figure = Markup(figures.inline_svg(speed_figure(own), f"Speed, {name}")) if drawn else ""
    return {
        "name": name,
        "backend": own[0].backend,
        "columns": lines.COLUMNS[own[0].workload],
        "lines": [lines.line(r, own, records) for r in own],
        "bad": [r.status != "ok" for r in own],
        "figure": figure,
    }


def origins(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Machine, tree and backend of the records, each once."""
    seen = {(r.machine, r.cell.tree, r.cell.backend): r for r in records}
    return [{"machine": record.machine, "facts": _facts(record)} for record in seen.values()]


def _facts(record: Record) -> dict[str, str]:
    origin, machine = record.provenance, record.provenance.machine
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB",
        "GPU": machine.gpu,
        "CPU features": " ".join(machine.features),
        "system": machine.os,
        "backend": record.cell.backend,
        "llama.cpp pin": origin.pin,
        "patch series": origin.series,
        "tree": origin.tree + (" (edited)" if origin.dirty else ""),
        "compiler": origin.compiler,
        "flags": " ".join(origin.flags),
        "packages": ", ".join(f"{k} {v}" for k, v in origin.packages.items()),
        "harness": origin.harness,
    }


def files(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Name and sha256 of every model and text."""
    found = {(r.cell.model.split("/")[-1], r.cell.model_sha256) for r in records}
    found |= {(r.cell.corpus.split("/")[-1], r.cell.corpus_sha256) for r in records}
    return sorted(found)
