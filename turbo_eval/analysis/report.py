"""Records → one self-contained HTML page, the same in markdown, and its figures as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from turbo_eval.analysis import figures, table
from turbo_eval.analysis.statistics import decided
from turbo_eval.analysis.summary import (
    Summary,
    by_setting,
    environment,
    said_of_reference,
    summarize,
    threads,
)
from turbo_eval.bench.run import BenchRecord, pair_label, quality, quality_words
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.records.record import Record
from turbo_eval.util.files import writing

HEATS = (
    ("kld", "KL divergence from f16 [nats]", "{:z.4f}"),
    ("delta_pct", "ΔPPL [%]", "{:+.2f}"),
)


def write_report(records: Sequence[Record], benches: Sequence[BenchRecord], out: Path) -> Path:
    """Write index.html, report.md and figures/ under `out`; returns the page's path.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    groups = [rows for _, rows in by_setting(summarize(records))]
    groups.sort(key=lambda rows: (rows[0].model, rows[0].ctx, rows[0].anchor))
    page = out / "index.html"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(html_page(groups, records, benches), encoding="utf-8")
        (out / "report.md").write_text(markdown(groups, records, benches), encoding="utf-8")
        for name, figure in _all_figures(groups, benches):
            for suffix in (".svg", ".png"):
                figures.save(figure, out / "figures" / f"{name}{suffix}")
    return page


def _all_figures(
    groups: Sequence[Sequence[Summary]], benches: Sequence[BenchRecord]
) -> Iterator[tuple[str, Any]]:
    for number, rows in enumerate(groups, start=1):
        made = [("pareto", figures.pareto_figure(rows))]
        made += [(value, figures.heatmap_figure(rows, value)) for value, _, _ in HEATS]
        for name, figure in made:
            if figure is not None:
                yield f"{number}-{rows[0].model.split('/')[-1]}-{name}", figure
    for model, own in _by_model(benches):
        yield f"speed-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}", figures.speed_figure(own)


def _by_model(benches: Sequence[BenchRecord]) -> list[tuple[str, list[BenchRecord]]]:
    """(heading, records) of what may be compared; where a model is there several times, with what differs."""
    found: dict[tuple[str, ...], list[BenchRecord]] = {}
    for record in benches:
        env = " ".join(f"{name}={value}" for name, value in record.env.items())
        parts = (record.backend, f"build {record.tree[:12]}", f"{record.threads} threads", env)
        machine = record.provenance.machine.id
        found.setdefault((record.model.split("/")[-1], *parts, machine), []).append(record)
    headings = []
    for key, own in found.items():
        others = [other for other in found if other[0] == key[0]]
        apart = [part for at, part in enumerate(key) if at and len({other[at] for other in others}) > 1]
        headings.append((", ".join([key[0], *filter(None, apart)]), sorted(own, key=_bench_rank)))
    return headings


def _bench_rank(record: BenchRecord) -> tuple[int, float]:
    """By depth, then from many bits to few."""
    return record.depth, -(cache_type(record.k).bpv + cache_type(record.v).bpv)


def verdict(rows: Sequence[Summary]) -> list[str]:
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
    sure = decided(limit - found.pct, found.err_pct, found.df)
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
    parts = ["# KV cache report", ""]
    for title, rows in zip(titles(groups), groups, strict=True):
        parts += [
            f"## {title}",
            "",
            " ".join(verdict(rows)),
            "",
            table.render_markdown(rows),
        ]
    for model, own in _by_model(benches):
        parts += [f"## Speed: {model}", ""]
        parts += ["| depth | K/V | prefill t/s | × f16 | decode t/s | × f16 | quality |"]
        parts += ["| ---: | --- | ---: | ---: | ---: | ---: | --- |"]
        parts += ["| " + " | ".join(_bench_cells(r, own, records)) + " |" for r in own]
        parts.append("")
    return "\n".join(parts)


def _bench_cells(record: BenchRecord, among: Sequence[BenchRecord], records: Sequence[Record]) -> list[str]:
    row, label = record.row(), pair_label(record, among)
    if record.status != "ok":
        return [str(record.depth), label, "–", "–", "–", "–", record.status]
    found = quality(record, records)
    words = quality_words(found)
    names = (
        ("prefill_median", ".1f"),
        ("prefill_ratio", ".3f"),
        ("decode_median", ".2f"),
        ("decode_ratio", ".3f"),
    )
    numbers = [format(row[n], p) if row[n] is not None else "–" for n, p in names]
    return [str(record.depth), label, *numbers, words]


def html_page(
    groups: Sequence[Sequence[Summary]], records: Sequence[Record], benches: Sequence[BenchRecord]
) -> str:
    """The whole page; nothing in it is fetched from anywhere."""
    failures = [r for rows in groups for r in rows if r.status != "ok"]
    names = titles(groups)
    links = [(f"s{n}", name) for n, name in enumerate(names, start=1)]
    links = [
        ("summary", "Summary"),
        *links,
        *([("speed", "Speed")] if benches else []),
        ("provenance", "Provenance"),
    ]
    body = ['<a class="skip" href="#main">Skip to the content</a>', "<header><h1>KV cache report</h1>"]
    body.append(f"<p>{len(records)} records, pairs without a number: {len(failures)}.</p>")
    body.append("<nav aria-label='Sections'><ul>")
    body += [f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title in links]
    body.append("</ul></nav></header><main id='main'>")
    if failures:
        body.append("<section class='bad' aria-labelledby='f'><h2 id='f'>Failures</h2><ul>")
        body += [
            f"<li><strong>{escape(r.k)}/{escape(r.v)}</strong> on {escape(setting_title(r))}:"
            f" <code>{escape(r.status)}</code> {escape(r.detail)}</li>"
            for r in failures
        ]
        body.append("</ul></section>")
    body.append("<section><h2 id='summary'>Summary</h2>")
    for name, rows in zip(names, groups, strict=True):
        body.append(f"<h3>{escape(name)}</h3><p>{escape(' '.join(verdict(rows)))}</p>")
    body.append("</section>")
    for number, (name, rows) in enumerate(zip(names, groups, strict=True), start=1):
        body += _html_setting(number, name, rows)
    if benches:
        body += _html_speed(benches, records)
    body += _html_provenance(records)
    body.append("</main>")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>KV cache report</title><style>{_css()}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _css() -> str:
    return resources.files("turbo_eval.analysis").joinpath("report.css").read_text(encoding="utf-8")


def _html_setting(number: int, name: str, rows: Sequence[Summary]) -> list[str]:
    caption, columns, lines = table.for_people(table.to_frame(rows))
    out = [f"<section><h2 id='s{number}'>{escape(name)}</h2>"]
    out.append(f"<p>{escape(said_of_reference(rows))}.</p>")
    out.append(_scroll(f"Results, {caption}", _html_table(columns, lines, [r.status != "ok" for r in rows])))
    for value, title, form in HEATS:
        heat = _html_heat(rows, value, form)
        if heat:
            out.append(f"<h3>{escape(title)}, K × V</h3>" + _scroll(title, heat))
    figure = figures.pareto_figure(rows)
    if figure is not None:
        front = [r for r in figures.pareto(rows) if r.bpv < 16]
        names = ", ".join(r.name for r in front) or "none that is usable"
        out.append("<h3>Quality against bits per value</h3><figure>")
        out.append(figures.inline_svg(figure, "Loss against bits per value"))
        out.append(
            "<figcaption>On the Pareto front (no smaller cache is better, perplexity not doubled):"
            f" {escape(names)}.</figcaption>"
            "</figure>"
        )
    out.append("</section>")
    return out


def _scroll(label: str, inner: str) -> str:
    """Wide content in a box that scrolls, by keyboard too."""
    name = escape(label, quote=True)
    return f"<div class='scroll' tabindex='0' role='region' aria-label='{name}'>{inner}</div>"


def _html_table(columns: Sequence[str], lines: Sequence[Sequence[str]], bad: Sequence[bool]) -> str:
    head = "".join(f"<th scope='col'>{escape(c)}</th>" for c in columns)
    body = "".join(
        f"<tr{' class=bad' if failed else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for line, failed in zip(lines, bad, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_heat(rows: Sequence[Summary], value: str, form: str) -> str | None:
    cells = {(r.k, r.v): r for r in rows}
    if sum(figures.heat_value(r, value) is not None for r in rows) < 2:
        return None
    order = sorted({t for pair in cells for t in pair}, key=lambda t: -cache_type(t).bpv)
    ks = [t for t in order if any(k == t for k, _ in cells)]
    vs = [t for t in order if any(v == t for _, v in cells)]
    head = "<tr><th>K \\ V</th>" + "".join(f"<th scope='col'>{escape(v)}</th>" for v in vs) + "</tr>"
    body = ""
    for k in ks:
        body += f"<tr><th scope='row'>{escape(k)}</th>"
        for v in vs:
            row = cells.get((k, v))
            number = figures.heat_value(row, value) if row else None
            if number is not None:
                body += f"<td class='h{figures.level(number, value):.0f}'>{form.format(number)}</td>"
            else:
                body += f"<td class='none'>{escape(row.status) if row and row.status != 'ok' else '·'}</td>"
        body += "</tr>"
    return f"<table class='heat'><thead>{head}</thead><tbody>{body}</tbody></table>"


def _html_speed(benches: Sequence[BenchRecord], records: Sequence[Record]) -> list[str]:
    out = ["<section><h2 id='speed'>Speed</h2>"]
    columns = ("depth", "K/V", "prefill t/s", "× f16", "decode t/s", "× f16", "quality")
    for model, own in _by_model(benches):
        out.append(f"<h3>{escape(model)}, {escape(own[0].backend)}</h3>")
        lines = [_bench_cells(r, own, records) for r in own]
        out.append(_scroll("Speed", _html_table(columns, lines, [r.status != "ok" for r in own])))
        out.append(
            "<figure>" + figures.inline_svg(figures.speed_figure(own), "Speed against depth") + "</figure>"
        )
    return [*out, "</section>"]


def _html_provenance(records: Sequence[Record]) -> list[str]:
    seen = {(r.machine, r.cell.tree, r.cell.backend): r for r in records}
    out = ["<section><h2 id='provenance'>Provenance</h2>"]
    for record in seen.values():
        origin, machine = record.provenance, record.provenance.machine
        facts = {
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
        listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
        out.append(f"<details open><summary>{escape(record.machine)}</summary><dl>{listed}</dl></details>")
    files = {(r.cell.model.split("/")[-1], r.cell.model_sha256) for r in records}
    files |= {(r.cell.corpus.split("/")[-1], r.cell.corpus_sha256) for r in records}
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{digest}</code></dd>" for name, digest in sorted(files)
    )
    out.append(f"<details><summary>sha256 of models and texts</summary><dl>{listed}</dl></details>")
    return [*out, "</section>"]
