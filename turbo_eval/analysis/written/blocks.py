"""The blocks by name: records of results/reference/ → Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from turbo_eval.analysis.report import setting_title
from turbo_eval.analysis.summary import Summary, by_setting, said_of_reference, summarize
from turbo_eval.analysis.table import for_people, to_frame
from turbo_eval.errors import IncompleteError
from turbo_eval.formats.cache_types import cache_type, kv_mib
from turbo_eval.formats.window import OFF, Window, resolve
from turbo_eval.records.store import read_all
from turbo_eval.util.text import read_toml

_STEP = "measure it: results/README.md says how"


def _settings(reference: Path) -> list[list[Summary]]:
    """The tables of all folders, in the order of their names.

    Raises:
        IncompleteError: there are no records.
    """
    folders = sorted(p for p in reference.glob("*") if p.is_dir()) if reference.is_dir() else []
    found = [rows for folder in folders for _, rows in by_setting(summarize(read_all([folder])))]
    if not found:
        raise IncompleteError(f"there are no records in {reference}", _STEP)
    return found


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], texts: int) -> str:
    """The first `texts` columns, and one of options or states at the end, are words; the others figures."""
    words = {*heads[:texts], "options of llama-server", "status", "verdict"}
    rules = ["---" if head in words else "---:" for head in heads]
    rows = (heads, rules, *lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


_TOLD = ("K", "V", "window", "bpv", "bpv with it", "PPL", "ΔPPL %", "verdict", "KLD", "same top %", "status")


def measured(reference: Path) -> str:
    """A table for each setting in which pairs were judged: what a sweep says of all pairs."""
    parts = []
    for rows in _settings(reference):
        if all(row.verdict is None for row in rows):
            continue
        _, columns, lines = for_people(to_frame(rows))
        kept = [at for at, name in enumerate(columns) if name in _TOLD]
        picked = [[line[at] for at in kept] for line in lines]
        heads = [columns[at] for at in kept]
        title = f"{setting_title(rows[0])}; {said_of_reference(rows)}."
        parts.append(
            f"{title}\n\n{_table(heads, picked, heads.index('window') + 1 if 'window' in heads else 2)}"
        )
    if not parts:
        raise IncompleteError(f"no record in {reference} has figures of each token", _STEP)
    return "\n" + "\n".join(parts)


_CONTEXT = 32768
_WINDOW_UNIT = 16  # a window's cells come in multiples of it

_BUDGETS = (
    ("a half", ("q8_0", "q8_0")),
    ("a quarter", ("turbo4", "turbo4")),
    ("a fifth", ("turbo3", "turbo3")),
)


def _gib(pair: tuple[str, str], window: Window) -> float:
    cells = -(-(window.recent + window.first) // _WINDOW_UNIT) * _WINDOW_UNIT
    return (_mib(pair, _CONTEXT) + _mib(("q8_0", "q8_0"), cells)) / 1024


def _mib(pair: tuple[str, str], ctx: int) -> float:
    """For a shape that many models of 8 billion parameters have."""
    return kv_mib(*pair, n_layer=32, n_head_kv=8, dim_k=128, dim_v=128, ctx=ctx)


def budgets(reference: Path) -> str:
    """A cache for each amount of memory, with its KL divergence on each model that was measured."""
    settings = [rows for rows in _settings(reference) if any(_kld(row) for row in rows)]
    heads = ["memory, of f16's", "K and V", "GiB for an 8B model at 32k tokens"]
    heads += [f"KLD, {rows[0].model}, {rows[0].chunks} × {rows[0].ctx} tokens" for rows in settings]
    lines = []
    for words, pair in _BUDGETS:
        window = resolve("auto", "auto", *pair)
        own = [
            next((row for row in rows if (row.k, row.v) == pair and row.window == window), None)
            for rows in settings
        ]
        figures = [f"{kld:.4f}" if row is not None and (kld := _kld(row)) is not None else "–" for row in own]
        serve = f"`-fa on -ctk {pair[0]} -ctv {pair[1]}`"
        lines.append([words, "/".join(pair), f"{_gib(pair, window):.2f}", *figures, serve])
    return _table([*heads, "options of llama-server"], lines, 2)


def _kld(row: Summary) -> float | None:
    record = row.get("kld")
    return record.kld.mean if record is not None and record.kld is not None else None


def window_effect(reference: Path) -> str:
    """KL divergence of each pair without and with the exact window."""
    heads = ["model", "K/V", "KLD", "KLD with the window", "times smaller"]
    lines = []
    for rows in _settings(reference):
        plain = {(row.k, row.v): row for row in rows if row.window == OFF}
        for row in rows:
            without = plain.get((row.k, row.v))
            x, y = (None if r is None else _kld(r) for r in (without, row))
            if row.window and x and y:
                place = f"{row.model}, {row.chunks} × {row.ctx} tokens"
                lines.append([place, f"{row.k}/{row.v}", f"{x:.4f}", f"{y:.4f}", f"{x / y:.1f}"])
    if not lines:
        raise IncompleteError(f"no pair in {reference} was measured without and with the window", _STEP)
    return _table(heads, lines, 2)


_EXACT_MODEL = "smollm2-135m-f32"  # weights without noise of their own
_BITS_AT = 8192  # tokens


def compared(reference: Path) -> str:
    """Our types beside what people use: KL divergence from records, the rest from `compared.toml`, where each
    figure names its source. For README."""
    rows = next((rows for rows in _settings(reference) if rows[0].model == _EXACT_MODEL), None)
    if rows is None:
        raise IncompleteError(f"no record in {reference} is of {_EXACT_MODEL}", _STEP)
    facts = read_toml(reference / "compared.toml", what="facts ")["row"]
    measured_as = f"KLD, SmolLM2, {rows[0].chunks} × {rows[0].ctx} tokens"
    heads = [
        "",
        f"bits per value, at {_BITS_AT} tokens",
        measured_as,
        "[PPL](docs/reference/glossary.md#perplexity), Qwen2.5 1.5B",
    ]
    heads += ["H100, 65536 tokens", "CPU, 4096 tokens"]
    lines = [_compared(fact, rows) for fact in facts]
    return _table(heads, lines, 1)


def _compared(fact: dict[str, Any], rows: Sequence[Summary]) -> list[str]:
    bits, kld = float(fact.get("bits", 0.0)), "–"
    if "cache" in fact:
        k, v = fact["cache"]
        window = resolve("auto", "auto", k, v) if fact.get("window") else OFF
        cells = -(-(window.recent + window.first) // _WINDOW_UNIT) * _WINDOW_UNIT
        bits = (cache_type(k).bpv + cache_type(v).bpv) / 2 + cells * cache_type("q8_0").bpv / _BITS_AT
        row = next((row for row in rows if (row.k, row.v) == (k, v) and row.window == window), None)
        found = _kld(row) if row is not None else None
        kld = "–" if found is None else f"{found:.4f}" if found else "0"
    cells_ = [f"{bits:.2f}" if bits != int(bits) else f"{bits:.0f}", kld, _sourced(fact, "ppl", "{:.2f}")]
    return [fact["name"], *cells_, *(_sourced(fact, name, "{:.2f}×") for name in ("h100", "cpu"))]


def _sourced(fact: dict[str, Any], name: str, pattern: str) -> str:
    known = fact.get(name)
    if known is None or not known.get("source"):
        return "–"
    value = float(known["value"])
    return pattern.format(value) if value < 100 else f"{value:.0f}"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "measured": measured,
    "budgets": budgets,
    "window-effect": window_effect,
    "compared": compared,
}
