"""Records → one data frame → rich, markdown, CSV or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbo_eval.formats.cache_types import cache_type
from turbo_eval.records.record import Record
from turbo_eval.sweep.plan import comparison

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

Pair = tuple[str, str]


@dataclass(frozen=True)
class Summary:
    """All that is on record for one pair in one setting: a row of the table.

    `delta_pct` is against the baseline of the same model, text, build, anchor and machine;
    None without a baseline: no baseline, no verdict. `delta_err_pct` is its paired standard error,
    known where the pair was run against the f16 base and f16 is the baseline. `compression` is f16
    size / this size, `status` "ok" or the first failure among the pair's cells.
    """

    machine: str
    model: str
    corpus: str
    ctx: int
    chunks: int
    backend: str
    anchor: str
    tree: str
    k: str
    v: str
    records: tuple[Record, ...]
    ppl: float | None
    ppl_err: float | None
    delta_pct: float | None
    delta_err_pct: float | None
    status: str
    detail: str

    @property
    def bpv_k(self) -> float:
        return next((r.bpv_k for r in self.records if r.effective.k_bits), cache_type(self.k).bpv)

    @property
    def bpv_v(self) -> float:
        return cache_type(self.v).bpv

    @property
    def bpv(self) -> float:
        """Mean bits per value of K and V."""
        return (self.bpv_k + self.bpv_v) / 2

    @property
    def kv_mib(self) -> float | None:
        """MiB of the cell's context; generation has contexts of its own and doesn't count."""
        sized = (r for r in self.records if r.ok and r.cell.metric not in ("greedy", "needle"))
        return next((r.effective.kv_mib for r in sized if r.effective.kv_mib), None)

    @property
    def compression(self) -> float:
        return 16.0 / self.bpv

    def get(self, metric: str) -> Record | None:
        """The pair's good record of a metric."""
        return next((r for r in self.records if r.ok and r.cell.metric == metric), None)


def setting(record: Record) -> tuple[str, ...]:
    """What two records must share to be compared: machine, model, text, build, anchor, context."""
    return (record.machine, comparison(record.cell))


def summarize(records: Sequence[Record], baseline: Pair | None = None) -> list[Summary]:
    """Group records by setting and pair and compare each with its setting's baseline.

    Args:
        baseline: the pair to compare with; None: f16:f16 where there is one, else q8_0:q8_0.
    """
    settings: dict[tuple[str, ...], dict[Pair, list[Record]]] = {}
    for record in records:
        pair = (record.cell.k, record.cell.v)
        settings.setdefault(setting(record), {}).setdefault(pair, []).append(record)
    rows: list[Summary] = []
    for pairs in settings.values():
        wanted = [baseline] if baseline else [("f16", "f16"), ("q8_0", "q8_0")]
        base = next((p for p in wanted if p in pairs), None)
        reference = _ppl(pairs[base]) if base else None
        for (k, v), group in sorted(pairs.items(), key=lambda item: _rank(item[0], base)):
            rows.append(_summary(k, v, group, reference))
    return rows


def _rank(pair: Pair, base: Pair | None) -> tuple[bool, float, float]:
    """The baseline first, then from many bits to few."""
    k, v = cache_type(pair[0]).bpv, cache_type(pair[1]).bpv
    return pair != base, -(k + v), -k


def _ppl(group: Sequence[Record]) -> Record | None:
    """The record that gives a pair's perplexity: a plain run, else a KL run."""
    for metric in ("ppl", "kld"):
        for record in group:
            if record.ok and record.cell.metric == metric and record.ppl is not None:
                return record
    return None


def _summary(k: str, v: str, group: list[Record], reference: Record | None) -> Summary:
    best = _ppl(group)
    ppl = best.ppl if best else None
    delta = None
    if ppl is not None and reference is not None and reference.ppl:
        delta = 100 * (ppl / reference.ppl - 1)
    failed = next((r for r in group if not r.ok), None)
    first = best or group[0]
    text = next((r for r in group if r.cell.metric in ("ppl", "kld")), first)
    return Summary(
        machine=first.machine,
        model=first.cell.model,
        corpus=first.cell.corpus,
        ctx=first.cell.ctx,
        chunks=text.cell.chunks,
        backend=first.cell.backend,
        anchor=first.cell.anchor,
        tree=first.cell.tree,
        k=k,
        v=v,
        records=tuple(group),
        ppl=ppl,
        ppl_err=best.ppl_err if best else None,
        delta_pct=delta,
        delta_err_pct=_paired_error(group, reference) if delta is not None else None,
        status=failed.status if failed else "ok",
        detail=failed.detail if failed else "",
    )


def by_setting(rows: Sequence[Summary]) -> list[tuple[tuple[str, ...], list[Summary]]]:
    """Rows that may be compared with one another, together."""
    groups: dict[tuple[str, ...], list[Summary]] = {}
    for row in rows:
        groups.setdefault(setting(row.records[0]), []).append(row)
    return list(groups.items())


def _paired_error(group: list[Record], reference: Record | None) -> float | None:
    """Standard error of ΔPPL % over the same tokens; 0 errors of the baseline itself say nothing."""
    if reference is None or (reference.cell.k, reference.cell.v) != ("f16", "f16"):
        return None
    kld = next((r.kld for r in group if r.ok and r.kld is not None), None)
    return 100 * kld.ratio_err if kld is not None and kld.ratio_err is not None else None


def to_frame(rows: Sequence[Summary]) -> pd.DataFrame:
    """One row a pair and setting; columns that hold nothing for any row are left out."""
    import pandas as pd

    data = [_columns(row) for row in rows]
    frame = pd.DataFrame(data)
    if frame.empty:
        return frame
    keep = [c for c in frame.columns if c in _ALWAYS or frame[c].notna().any()]
    return frame[keep]


_ALWAYS = ("model", "K", "V", "PPL", "ΔPPL %", "status")


def _columns(row: Summary) -> dict[str, Any]:
    kld_record = row.get("kld")
    kld = kld_record.kld if kld_record else None
    decode = next((r.decode for r in row.records if r.decode), None)
    greedy = next((r.greedy for r in row.records if r.ok and r.greedy), None)
    needle = next((r.needle for r in row.records if r.ok and r.needle), None)
    return {
        "model": row.model,
        "corpus": row.corpus,
        "ctx": row.ctx,
        "chunks": row.chunks,
        "backend": row.backend,
        "anchor": row.anchor,
        "K": row.k,
        "V": row.v,
        "bpv K": row.bpv_k,
        "bpv V": row.bpv_v,
        "KV MiB": row.kv_mib,
        "× smaller": round(row.compression, 2),
        "PPL": row.ppl,
        "± PPL": row.ppl_err,
        "ΔPPL %": row.delta_pct,
        "± ΔPPL %": row.delta_err_pct,
        "KLD": kld.mean if kld else None,
        "± KLD": kld.mean_err if kld else None,
        "KLD 99 %": kld.p99 if kld else None,
        "same top %": kld.same_top_pct if kld else None,
        "decode Δ %": decode.delta_pct if decode else None,
        "greedy same %": greedy.agree_pct if greedy else None,
        "needle": f"{needle.hits}/{needle.f16_hits}" if needle else None,
        "status": row.status,
        "detail": row.detail or None,
        "machine": row.machine,
        "tree": row.tree[:12],
    }


def wide(rows: Sequence[Summary], column: str = "PPL") -> pd.DataFrame:
    """K × V matrix of one setting's `column` ("PPL", "ΔPPL %" or "KLD") as text; failed cells show
    their status, pairs without a cell "·"."""
    import pandas as pd

    frame = pd.DataFrame([_columns(row) for row in rows])
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
    caption = f"{rows[0].model}, ctx {rows[0].ctx}, chunks {rows[0].chunks}, anchor {rows[0].anchor}"
    return "\n".join([caption, "", *lines]) + "\n"


_FORMATS = {
    "PPL": "{:.4f}",
    "± PPL": "{:.2f}",
    "ΔPPL %": "{:+.2f}",
    "± ΔPPL %": "{:.2f}",
    "KLD": "{:z.5f}",
    "± KLD": "{:z.5f}",
    "KLD 99 %": "{:.4f}",
    "same top %": "{:.2f}",
    "decode Δ %": "{:+.2f}",
    "greedy same %": "{:.1f}",
    "KV MiB": "{:.2f}",
    "bpv K": "{:g}",
    "bpv V": "{:g}",
    "× smaller": "{:.2f}",
}


def format_value(column: str, value: Any) -> str:
    """A value as people read it; "–" where there is none."""
    if value is None or value != value:
        return "–"
    pattern = _FORMATS.get(column)
    return pattern.format(value) if pattern and isinstance(value, (int, float)) else str(value)


_COMMON = ("model", "corpus", "ctx", "chunks", "backend", "anchor", "machine", "tree")


def for_people(frame: pd.DataFrame, without: Sequence[str] = ()) -> tuple[str, list[str], list[list[str]]]:
    """(caption, column names, rows of text): what all rows share moves into the caption, and
    columns that belong together are joined."""
    same = [c for c in _COMMON if c in frame.columns and frame[c].nunique(dropna=False) == 1]
    caption = ", ".join(f"{c} {frame[c].iloc[0]}" for c in same)
    columns = [c for c in frame.columns if c not in (*same, *_JOINED, *without) and c != "detail"]
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
)
_JOINED = ("bpv V", "± PPL", "± ΔPPL %", "± KLD")
_HEADINGS = {"bpv K": "bpv"}


def render_rich(rows: Sequence[Summary], width: int = 0) -> Group:
    """The table for a terminal of `width` columns (0: any), failures explained below it.

    What doesn't fit is left out, least telling first; the other formats hold everything.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    frame = to_frame(rows)
    caption, columns, lines = for_people(frame)
    for end in range(1, len(_DISPENSABLE) + 1):
        if not width or _natural_width(columns, lines) <= width:
            break
        caption, columns, lines = for_people(frame, _DISPENSABLE[:end])
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        left = column in ("K", "V", "status", *_COMMON)
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="red" if row.status != "ok" else None)
    notes = [Text(f"{r.k}/{r.v}: {r.status}: {r.detail}", style="red") for r in rows if r.detail]
    return Group(Text(caption, style="dim"), table, *notes)


def render_markdown(rows: Sequence[Summary]) -> str:
    """The table as GitHub renders it."""
    caption, columns, lines = for_people(to_frame(rows))
    left = ("K", "V", "status", *_COMMON)
    text = [caption, "", "| " + " | ".join(columns) + " |"]
    text.append("|" + "|".join(" --- " if c in left else " ---: " for c in columns) + "|")
    text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    notes = [f"- {r.k}/{r.v}: {r.status}: {r.detail}" for r in rows if r.detail]
    return "\n".join([*text, *(["", *notes] if notes else [])]) + "\n"


def render_csv(rows: Sequence[Summary]) -> str:
    """The data frame as CSV, unrounded."""
    return str(to_frame(rows).to_csv(index=False))


def render_json(rows: Sequence[Summary]) -> str:
    """The rows as a JSON list: a record's flat fields, with `delta_pct`."""
    return json.dumps(json_rows(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def json_rows(rows: Sequence[Summary]) -> list[dict[str, Any]]:
    """One mapping a record; `delta_pct` only where the record has a perplexity of the batched run."""
    out = []
    for row in rows:
        for record in row.records:
            flat = record.row()
            batched = record.cell.metric in ("ppl", "kld")
            flat["delta_pct"] = row.delta_pct if batched and record.ok else None
            out.append(flat)
    return out
