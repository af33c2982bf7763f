"""Records → one self-contained HTML page, the same in markdown, and its figures as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turbo_eval.analysis import figures, page, table
from turbo_eval.analysis.picture import over_position
from turbo_eval.analysis.picture.cards import cards
from turbo_eval.analysis.picture.front import draw
from turbo_eval.analysis.picture.points import front
from turbo_eval.analysis.speed import lines
from turbo_eval.analysis.speed.figure import speed_figure
from turbo_eval.analysis.summary import (
    Summary,
    by_setting,
    environment,
    summarize,
    threads,
)
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.records.record import Record
from turbo_eval.records.speed import BenchRecord
from turbo_eval.util.files import writing


def write_report(
    records: Sequence[Record], benches: Sequence[BenchRecord], out: Path, folders: Sequence[Path] = ()
) -> Path:
    """Write index.html, report.md and figures/ under `out`; returns the page's path.

    Args:
        folders: where the records lie; figures of each token are looked for beside them.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    groups = [rows for _, rows in by_setting(summarize(records))]
    groups.sort(key=lambda rows: (rows[0].model, rows[0].ctx, rows[0].anchor))
    index = out / "index.html"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        index.write_text(html_page(groups, records, benches, folders), encoding="utf-8")
        (out / "report.md").write_text(markdown(groups, records, benches), encoding="utf-8")
        for name, figure in _all_figures(groups, benches, folders):
            for suffix in (".svg", ".png"):
                figures.save(figure, out / "figures" / f"{name}{suffix}")
    return index


def _all_figures(
    groups: Sequence[Sequence[Summary]], benches: Sequence[BenchRecord], folders: Sequence[Path]
) -> Iterator[tuple[str, Any]]:
    for number, rows in enumerate(groups, start=1):
        found = front(rows)
        made = [("front", draw(found) if found else None)]
        placed = over_position.lines(rows, folders)
        made += [("position", over_position.draw(placed) if placed else None)]
        made += [(value, figures.heatmap_figure(rows, value)) for value, _, _ in page.HEATS]
        for name, figure in made:
            if figure is not None:
                yield f"{number}-{rows[0].model.split('/')[-1]}-{name}", figure
    for model, own in _by_model(benches):
        yield f"speed-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}", speed_figure(own)


def _by_model(benches: Sequence[BenchRecord]) -> list[tuple[str, list[BenchRecord]]]:
    """(heading, records) of what may be compared; where a model is there several times, with what differs."""
    found: dict[tuple[str, ...], list[BenchRecord]] = {}
    for record in benches:
        env = " ".join(f"{name}={value}" for name, value in record.env.items())
        parts = (
            lines.NAMES[record.workload],
            record.backend,
            f"build {record.tree[:12]}",
            f"{record.threads} threads",
            env,
        )
        machine = record.provenance.machine.id
        found.setdefault((record.model.split("/")[-1], *parts, machine), []).append(record)
    headings = []
    for key, own in found.items():
        others = [other for other in found if other[0] == key[0]]
        apart = [part for at, part in enumerate(key) if at and len({other[at] for other in others}) > 1]
        headings.append((", ".join([key[0], *filter(None, apart)]), sorted(own, key=_bench_rank)))
    return headings


def _bench_rank(record: BenchRecord) -> tuple[int, int, float]:
    """By depth, then by sequences or length of draft, then from many bits to few."""
    if record.profile is not None:
        return record.depth, record.size, -(record.profile.bits_k + record.profile.bits_v)
    return record.depth, record.size, -(cache_type(record.k).bpv + cache_type(record.v).bpv)


def conclusion(rows: Sequence[Summary]) -> list[str]:
    """What a setting's rows say, in sentences."""
    against = rows[0].against
    measured = [r for r in rows if r.status == "ok" and r.delta is not None and not r.is_reference]
    quantized = [r for r in measured if r.bpv < 16]
    failed = [r for r in rows if r.status != "ok"]
    said: list[str] = []
    named: set[tuple[str, str]] = set()
    for limit in (1.0, 3.0):
        within = [r for r in quantized if r.delta_pct is not None and r.delta_pct <= limit]
        best = min(within, key=lambda r: (r.bpv, r.delta_pct or 0), default=None)
        if best is None or (best.k, best.v) in named:
            continue
        named.add((best.k, best.v))
        said.append(
            f"Within {limit:g} % of the perplexity of {against}, {best.name} is the smallest cache:"
            f" {best.bpv:g} bits per value, {best.compression:.1f} times smaller than f16,"
            f" {_delta(best, limit)}."
        )
    if not any(r.delta is not None for r in rows):
        said.append(f"The reference {against} is not on record: no verdict.")
    elif not quantized:
        said.append(f"No quantized pair was measured beside {against}: no verdict.")
    elif not said:
        said.append(
            f"None of the {len(quantized)} quantized pairs stays within 3 % of the perplexity of {against}."
        )
    broken = [r for r in measured if not figures.usable(r)]
    if broken:
        names = ", ".join(r.name for r in broken)
        said.append(f"Unusable here (perplexity more than doubled): {names}.")
    if failed:
        said.append(f"{len(failed)} of {len(rows)} pairs have no number.")
    return said


def _delta(row: Summary, limit: float) -> str:
    """The row's ΔPPL with its error, and whether it is certain to be within the limit."""
    assert row.delta is not None
    found = row.delta
    error = f" ± {found.err_pct:.2f}" if found.err_pct is not None else ""
    sure = row.beyond_doubt(limit)
    return f"ΔPPL {found.pct:+.2f}{error} %" + ("" if sure else ", too close to the limit for this much text")


def setting_title(row: Summary) -> str:
    """One line that names a setting; what else parts it from others is said by `titles`."""
    return (
        f"{row.model.split('/')[-1]}, {row.corpus.split('/')[-1]}, {row.chunks} × {row.ctx} tokens,"
        f" {row.backend}, anchor {row.anchor}" + (f", {environment(row)}" if environment(row) else "")
    )


def titles(groups: Sequence[Sequence[Summary]]) -> list[str]:
    """A heading for each setting; those that would read alike say what differs, e.g. the build."""
    plain = [setting_title(rows[0]) for rows in groups]
    found = []
    for title, rows in zip(plain, groups, strict=True):
        alike = [other[0] for other, name in zip(groups, plain, strict=True) if name == title]
        differing = [read(rows[0]) for read in _APART if len({read(row) for row in alike}) > 1]
        found.append(", ".join([title, *differing]))
    return found


_APART: tuple[Callable[[Summary], str], ...] = (
    lambda row: f"build {row.tree[:12]}",
    lambda row: row.machine,
    lambda row: f"ubatch {row.records[0].cell.batched('ppl').ubatch}",
    lambda row: f"flash attention {'on' if row.records[0].cell.flash_attn else 'off'}",
    lambda row: f"model {row.records[0].cell.model_sha256[:8]}",
    lambda row: f"text {row.records[0].cell.corpus_sha256[:8]}",
    lambda row: f"anchor file {row.records[0].cell.anchor_sha256[:8]}",
    lambda row: f"{threads(row)} threads",
)


def markdown(
    groups: Sequence[Sequence[Summary]], records: Sequence[Record], benches: Sequence[BenchRecord]
) -> str:
    """The report for a pull request."""
    settings = [
        {"name": name, "conclusion": conclusion(rows), "markdown": table.render_markdown(rows)}
        for name, rows in zip(titles(groups), groups, strict=True)
    ]
    template = page.environment().get_template("report.md.j2")
    speeds = [page.speed(name, own, records) for name, own in _by_model(benches)]
    text = template.render(settings=settings, speeds=speeds)
    return text.rstrip() + "\n"


def worth_showing(groups: Sequence[Sequence[Summary]]) -> list[Sequence[Summary]]:
    """Without settings that hold nothing but the f16/f16 run that others of the model are compared with."""
    used = {row.reference.key for rows in groups for row in rows if row.reference is not None}
    return [
        rows
        for rows in groups
        if any(r.status != "ok" or r.bpv < 16 for r in rows)
        or not {r.key for row in rows for r in row.records} & used
    ]


def html_page(
    groups: Sequence[Sequence[Summary]],
    records: Sequence[Record],
    benches: Sequence[BenchRecord],
    folders: Sequence[Path] = (),
) -> str:
    """The whole page; nothing in it is fetched from anywhere. `folders` as for `write_report`."""
    groups = worth_showing(groups)
    names = titles(groups)
    return (
        page.environment()
        .get_template("report.html.j2")
        .render(
            css=page.css(),
            script=page.script(),
            cards=cards(groups),
            records=records,
            failures=[r for rows in groups for r in rows if r.status != "ok"],
            settings=[
                page.setting(number, name, rows, conclusion(rows), folders)
                for number, (name, rows) in enumerate(zip(names, groups, strict=True), start=1)
            ],
            speeds=[page.speed(name, own, records, drawn=True) for name, own in _by_model(benches)],
            origins=page.origins(records),
            files=page.files(records),
            setting_title=setting_title,
        )
        + "\n"
    )
