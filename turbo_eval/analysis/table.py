"""Rows → one data frame → rich, markdown, CSV or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from turbo_eval.analysis.summary import Summary, environment, said_of_reference, threads
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.metrics import METRICS
from turbo_eval.metrics.base import Column


def to_frame(rows: Sequence[Summary]) -> pd.DataFrame:
    """One row a pair and setting; columns that hold nothing for any row are left out."""

    data = [_columns(row) for row in rows]
    frame = pd.DataFrame(data)
    if frame.empty:
        return frame
    keep = [c for c in frame.columns if c in _ALWAYS or frame[c].notna().any()]
    return frame[keep]


_ALWAYS = ("model", "K", "V", "PPL", "ΔPPL %", "status")


METRIC_COLUMNS = [column for metric in METRICS.values() for column in metric.columns]


def _value(row: Summary, column: Column) -> Any:
    """What the first of the row's records that has the figure says."""
    return next((value for r in row.records if (value := column.value(r)) is not None), None)


def _columns(row: Summary) -> dict[str, Any]:
    return {
        "model": row.model,
        "corpus": row.corpus,
        "ctx": row.ctx,
        "chunks": row.chunks,
        "backend": row.backend,
        "anchor": row.anchor,
        "K": row.k,
        "V": row.v,
        "window": str(row.window) if row.window else None,
        "bpv K": row.bpv_k,
        "bpv V": row.bpv_v,
        "bpv with it": round(row.bpv, 3) if row.window else None,
        "KV MiB": row.kv_mib,
        "× smaller": round(row.compression, 2),
        "PPL": row.ppl,
        "± PPL": row.ppl_err,
        "ΔPPL %": row.delta_pct,
        "± ΔPPL %": row.delta_err_pct,
        "verdict": _verdict_text(row),
        "against": row.against if row.delta is not None else None,
        **{column.heading: _value(row, column) for column in METRIC_COLUMNS},
        "status": row.status,
        "detail": row.detail or None,
        "machine": row.machine,
        "tree": row.tree[:12],
        "env": environment(row) or None,
        "threads": threads(row),
    }


def wide(rows: Sequence[Summary], column: str = "PPL") -> pd.DataFrame:
    """K × V matrix of one setting's `column` ("PPL", "ΔPPL %" or "KLD") as text; failed cells show
    their status, pairs without a cell "·"."""

    frame = pd.DataFrame([_columns(row) for row in rows if row.profile is None])
    frame["shown"] = [
        format_value(column, line[column]) if line["status"] == "ok" else line["status"]
        for _, line in frame.iterrows()
    ]
    order = sorted({*frame["K"], *frame["V"]}, key=lambda t: -cache_type(t).bpv)
    matrix = frame.pivot_table(index="K", columns="V", values="shown", aggfunc="first")
    index = [t for t in order if t in matrix.index]
    return matrix.reindex(index=index, columns=[t for t in order if t in matrix.columns]).fillna("·")


def render_matrix(rows: Sequence[Summary], column: str) -> str:
    """The K × V matrix as markdown, which a terminal can show as well."""
    matrix = wide(rows, column)
    lines = [f"| {column}: K \\ V | " + " | ".join(matrix.columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(matrix.columns))
    lines += [
        f"| {k} | " + " | ".join(line) + " |" for k, line in zip(matrix.index, matrix.values, strict=True)
    ]
    row = rows[0]
    caption = f"{row.model}, {row.corpus}, ctx {row.ctx}, chunks {row.chunks}, anchor {row.anchor}"
    caption += f", {environment(row)}" if environment(row) else ""
    if column == "ΔPPL %":
        caption += f"; {said_of_reference(rows)}"
    return "\n".join([caption, "", *lines]) + "\n"


_FORMATS = {
    "PPL": "{:.4f}",
    "± PPL": "{:.2f}",
    "ΔPPL %": "{:+.2f}",
    "± ΔPPL %": "{:.2f}",
    **{column.heading: column.pattern for column in METRIC_COLUMNS},
    "KV MiB": "{:.2f}",
    "bpv K": "{:g}",
    "bpv V": "{:g}",
    "bpv with it": "{:.2f}",
    "× smaller": "{:.2f}",
}


def format_value(column: str, value: Any) -> str:
    """A value as people read it; "–" where there is none."""
    if value is None or value != value:
        return "–"
    pattern = _FORMATS.get(column)
    return pattern.format(value) if pattern and isinstance(value, (int, float)) else str(value)


_LEFT = ("K", "V", "window", "verdict", "status")
_COMMON = ("model", "corpus", "ctx", "chunks", "backend", "anchor", "machine", "tree", "env", "threads")


def for_people(frame: pd.DataFrame, without: Sequence[str] = ()) -> tuple[str, list[str], list[list[str]]]:
    """(caption, column names, rows of text): what all rows share moves into the caption, and
    columns that belong together are joined."""
    same = [c for c in _COMMON if c in frame.columns and frame[c].nunique(dropna=False) == 1]
    caption = ", ".join(f"{c} {frame[c].iloc[0]}" for c in same)
    hidden = {*same, *_JOINED, *without, "detail", "against"}
    columns = [c for c in frame.columns if c not in hidden]
    rows = []
    for _, line in frame.iterrows():
        texts = {c: format_value(c, line[c]) for c in frame.columns}
        texts["bpv K"] = f"{texts['bpv K']}/{texts['bpv V']}"
        for c in ("PPL", "ΔPPL %", "KLD"):
            if texts.get(f"± {c}", "–") != "–" and f"± {c}" not in without:
                texts[c] += f" ± {texts[f'± {c}']}"
        rows.append([texts[c] for c in columns])
    return caption, [_HEADINGS.get(c, c) for c in columns], rows


def _natural_width(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    return sum(widths) + 2 * len(widths) + 2


_DISPENSABLE = (
    "KLD 99 %",
    "± KLD",
    "× smaller",
    "± ΔPPL %",
    "± PPL",
    "KV MiB",
    "corpus",
    "needle",
    "decode Δ %",
    "bpv with it",
    "same top %",
)
_JOINED = ("bpv V", "± PPL", "± ΔPPL %", "± KLD")
_HEADINGS = {"bpv K": "bpv"}


def render_rich(rows: Sequence[Summary], width: int = 0) -> Group:
    """The table for a terminal of `width` columns (0: any), failures explained below it.

    What doesn't fit is left out, least telling first; the other formats hold everything.
    """

    frame = to_frame(rows)
    caption, columns, lines = for_people(frame)
    caption += f"; {said_of_reference(rows)}"
    for end in range(1, len(_DISPENSABLE) + 1):
        if not width or _natural_width(columns, lines) <= width:
            break
        _, columns, lines = for_people(frame, _DISPENSABLE[:end])
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        left = column in (*_LEFT, *_COMMON)
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="red" if row.status != "ok" else None)
    notes = [Text(f"{r.name}: {r.status}: {r.detail}", style="red") for r in rows if r.detail]
    return Group(Text(caption, style="dim"), table, *notes)


def render_markdown(rows: Sequence[Summary]) -> str:
    """The table as GitHub renders it."""
    caption, columns, lines = for_people(to_frame(rows))
    caption += f"; {said_of_reference(rows)}"
    text = [caption, "", "| " + " | ".join(columns) + " |"]
    text.append("|" + "|".join(" --- " if c in (*_LEFT, *_COMMON) else " ---: " for c in columns) + "|")
    text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    notes = [f"- {r.name}: {r.status}: {r.detail}" for r in rows if r.detail]
    return "\n".join([*text, *(["", *notes] if notes else [])]) + "\n"


def render_csv(rows: Sequence[Summary]) -> str:
    """The data frame as CSV, unrounded."""
    return str(to_frame(rows).to_csv(index=False))


def render_json(rows: Sequence[Summary]) -> str:
    """The rows as a JSON list: a record's flat fields, with `delta_pct`."""
    return json.dumps(json_rows(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _interval(row: Summary) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of ΔPPL in percent; None where they are not known or infinite."""
    if row.paired is None:
        return None, None
    found = row.paired.interval()
    low, high = (x if math.isfinite(x) else None for x in (found.low, found.high))
    return low, high


def _verdict_text(row: Summary) -> str | None:
    """ "worse", or "undecided (+12)": 12 more chunks would tell."""
    if row.verdict is None:
        return None
    more = row.verdict.more_chunks
    return row.verdict.verdict + (f" (+{more})" if more is not None else "")


def _verdict(row: Summary | None) -> dict[str, Any]:
    found = row.verdict if row is not None else None
    return {
        "verdict": found.verdict if found else None,
        "verdict_margin_pct": found.margin_pct if found else None,
        "verdict_more_chunks": found.more_chunks if found else None,
    }


def json_rows(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    """One mapping a record; `delta_pct` only where the record has a perplexity of the batched run."""
    out = []
    for row in rows:
        for record in row.records:
            flat = record.row()
            batched = record.cell.metric in ("ppl", "kld")
            compared = row.delta is not None and batched and record.ok
            flat["delta_pct"] = row.delta_pct if compared else None
            flat["delta_err_pct"] = row.delta_err_pct if compared else None
            flat["delta_low_pct"], flat["delta_high_pct"] = _interval(row) if compared else (None, None)
            flat |= _verdict(row if compared else None)
            flat["against"] = row.against if compared else None
            flat["reference_key"] = row.reference.key if compared and row.reference else None
            flat["threads"] = record.run.threads
            flat["env"] = record.cell.env
            out.append(flat)
    return out
