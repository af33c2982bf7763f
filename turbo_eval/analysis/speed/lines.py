"""Speed records as tables: the same lines on a terminal, in the report and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_eval.bench.quality import one_token, pair_label, quality, quality_words
from turbo_eval.records.record import Record
from turbo_eval.records.speed import BenchRecord, Workload

COLUMNS: dict[Workload, tuple[str, ...]] = {
    "depth": ("depth", "K/V", "prefill t/s", "× f16", "decode t/s", "× f16", "quality"),
    "parallel": ("sequences", "K/V", "prompts t/s", "× f16", "new t/s", "each t/s", "× f16", "quality"),
    "draft": ("depth", "draft", "K/V", "step ms", "× one token", "tokens/s", "× f16", "quality"),
}
# What a heading calls each kind where a model has several.
NAMES: dict[Workload, str] = {
    "depth": "over depth",
    "parallel": "sequences at once",
    "draft": "drafts checked at once",
}


def line(record: BenchRecord, among: Sequence[BenchRecord], known: Sequence[Record]) -> list[str]:
    """A record under the columns of its workload; one that failed has its status in the last of them."""
    columns = COLUMNS[record.workload]
    named = {
        "depth": str(record.depth),
        "sequences": str(record.size),
        "draft": str(record.size),
        "K/V": pair_label(record, among),
    }
    head = [named[c] for c in columns if c in named]
    if record.status != "ok":
        return [*head, *["–"] * (len(columns) - len(head) - 1), record.status]
    row = record.row()
    names = {
        "depth": (("prefill_median", 1), ("prefill_ratio", 3), ("decode_median", 2), ("decode_ratio", 3)),
        "parallel": (
            *(("prefill_median", 1), ("prefill_ratio", 3), ("decode_median", 1)),
            *(("decode_each", 1), ("decode_ratio", 3)),
        ),
        "draft": (("step_ms", 2), ("times_one_token", 2), ("decode_median", 1), ("decode_ratio", 3)),
    }[record.workload]
    one = one_token(record, among)
    row["times_one_token"] = row["step_ms"] / one.step_ms if one and one.step_ms and row["step_ms"] else None
    numbers = ["–" if row[name] is None else f"{row[name]:.{places}f}" for name, places in names]
    return [*head, *numbers, quality_words(quality(record, known))]
