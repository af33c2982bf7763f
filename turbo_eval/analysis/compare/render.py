"""A comparison for a terminal, an issue or a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from turbo_eval.analysis.compare import Comparison, Difference
from turbo_eval.analysis.compare.match import facts

# Said once where all rows agree: what else would make two rows read alike.
_SHARED = ("model", "corpus", "ctx", "chunks", "backend", "anchor", "environment", "threads", "build")
_COLUMNS = (*_SHARED, "K:V", "metric", "A", "B", "difference", "chance", "verdict")
_AS_RECORDED = {"corpus": "corpus name", "environment": "env", "build": "tree"}


def _number(what: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.6f}" if what == "KLD" else f"{value:.2f}" if "%" in what else f"{value:.4f}"


def _delta(d: Difference) -> str:
    if d.delta is None:
        return "–"
    if d.delta == 0:
        return "0"
    unit = " %" if d.what == "PPL" or d.is_speed else ""
    digits = 6 if d.what == "KLD" else 3
    error = "" if d.error is None else f" ± {d.error:.{digits}f}"
    unpaired = " unpaired" if d.error is not None and not d.paired and not d.is_speed else ""
    return f"{d.delta:+.{digits}f}{error}{unit}{unpaired}"


def _chance(p: float) -> str:
    return "" if p >= 0.995 else f"{p:.2g}" if p >= 1e-12 else "< 1e-12"


def _line(d: Difference, differs: bool) -> list[str]:
    sides = [
        _number(d.what, value) if status == "ok" else status
        for value, status in ((d.a, d.status_a), (d.b, d.status_b))
    ]
    failed = d.status_a == d.status_b != "ok"
    small = f", {_agreement(d)}" if d.verdict is not None and d.verdict.verdict == "equivalent" else ""
    verdict = f"differs{small}" if differs else "fails on both" if failed else _agreement(d)
    own = {"model": d.model, "ctx": d.ctx}
    told = [own.get(name) or _both(d, _AS_RECORDED.get(name, name)) for name in _SHARED]
    return [*told, d.pair, d.what, *sides, _delta(d), _chance(d.p), verdict]


def _both(d: Difference, name: str) -> str:
    """What A and B have of a field; "a→b" where it differs."""
    values = [facts(entry).get(name, "") for entry in (d.of_a, d.of_b)]
    if name == "env":
        values = [" ".join(f"{k}={v}" for k, v in json.loads(text or "{}").items()) or "–" for text in values]
    elif name == "tree":
        values = [value[:12] for value in values]
    return "→".join(dict.fromkeys(values)) or "–"


def _agreement(d: Difference) -> str:
    if not d.delta:
        return "same"
    if d.verdict is not None:
        within = f" within {d.verdict.margin_pct:g} %" if d.verdict.verdict == "equivalent" else ""
        return f"{d.verdict}{within}"
    return "unclear: score more chunks" if d.p < 0.05 else "within noise"


def _table(result: Comparison) -> tuple[str, list[str], list[list[str]]]:
    """(what all rows share, columns, rows); the differing ones first."""
    lines = [
        *(_line(d, True) for d in result.differing),
        *(_line(d, False) for d in result.agreeing),
    ]
    shared, keep = [], list(range(len(_COLUMNS)))
    for name in _SHARED:
        at = _COLUMNS.index(name)
        if len({line[at] for line in lines}) == 1:
            if lines[0][at] != "–":
                shared.append(f"{name} {lines[0][at]}")
            keep.remove(at)
    return ", ".join(shared), [_COLUMNS[n] for n in keep], [[line[n] for n in keep] for line in lines]


def _remarks(result: Comparison) -> list[str]:
    found = [f"Note: {note}." for note in result.notes]
    for name, cells in (("A", result.only_a), ("B", result.only_b)):
        if cells:
            more = f" and {len(cells) - 6} more" if len(cells) > 6 else ""
            found.append(f"Only {name} has: {'; '.join(cells[:6])}{more}.")
    return found


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = "| " + " | ".join(columns) + " |"
    return [head, "|" + " --- |" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)]


def render_markdown(result: Comparison) -> str:
    """Fit for an issue."""
    shared, columns, lines = _table(result)
    sides = f"**A** = `{result.a.name}`, **B** = `{result.b.name}`, compared with A"
    text = [sides + (f"; {shared}" if shared else ""), "", result.diagnosis, ""]
    text += _markdown_table(columns, lines)
    if result.provenance:
        text += ["", *_markdown_table(("recorded", "A", "B"), result.provenance)]
    else:
        text += ["", "Nothing recorded differs."]
    remarks = _remarks(result)
    return "\n".join([*text, *(["", *remarks] if remarks else [])]) + "\n"


def render_rich(result: Comparison) -> Group:
    """For a terminal."""

    def table(columns: Sequence[str]) -> Table:
        made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    shared, columns, lines = _table(result)
    numbers = table(columns)
    for line in lines:
        numbers.add_row(*line, style="red" if line[-1].startswith("differs") else None)
    head = f"A = {result.a.name}\nB = {result.b.name}, compared with A\n{shared}"
    parts: list[Table | Text] = [Text(head, style="dim"), numbers]
    if result.provenance:
        recorded = table(("recorded", "A", "B"))
        for row in result.provenance:
            recorded.add_row(*row)
        parts.append(recorded)
    parts += [Text(remark, style="dim") for remark in _remarks(result)]
    return Group(*parts, Text(result.diagnosis, style="bold"))


def render_json(result: Comparison) -> str:
    """For scripts: the differing and agreeing numbers with the keys of their records."""

    def row(d: Difference) -> dict[str, object]:
        without = ("of_a", "of_b", "verdict")
        flat = {f.name: getattr(d, f.name) for f in fields(d) if f.name not in without}
        flat["verdict"] = str(d.verdict) if d.verdict is not None else None
        keys = {"key_a": d.of_a.key, "key_b": d.of_b.key}
        own = {"model": d.model, "ctx": d.ctx, "k": d.k, "v": d.v}
        own |= {name: _both(d, _AS_RECORDED.get(name, name)) for name in _SHARED if name not in own}
        return own | flat | keys

    data = {
        "a": result.a.name,
        "b": result.b.name,
        "diagnosis": result.diagnosis,
        "differing": [row(d) for d in result.differing],
        "agreeing": [row(d) for d in result.agreeing],
        "provenance": [dict(zip(("what", "a", "b"), line, strict=True)) for line in result.provenance],
        "only_a": result.only_a,
        "only_b": result.only_b,
        "notes": result.notes,
    }
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
