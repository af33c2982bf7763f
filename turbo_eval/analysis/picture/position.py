"""KL divergence over context length and over the distance from the start, as figures and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_eval.errors import IncompleteError
from turbo_eval.evidence.paired import Interval, kl_divergence
from turbo_eval.evidence.position import Span, over_position
from turbo_eval.evidence.tokens import Tokens, load
from turbo_eval.records.record import Record
from turbo_eval.records.reference import is_exact


@dataclass(frozen=True)
class Course:
    """One cache on one text at one context length: its mean KL divergence, nats, and that of each span."""

    name: str
    model: str
    text: str
    metric: str
    ctx: int
    chunks: int
    kld: Interval
    spans: tuple[Span, ...]


def courses(records: Sequence[tuple[Record, Path]], metric: str, spans: int) -> list[Course]:
    """Those of every cache with figures of each token, by model, text, cache and context.

    Args:
        records: each with the folder that its token file lies below.
        metric: "kld", or "trajectory".
        spans: parts of equal length.

    Raises:
        IncompleteError: there is none, or a file of figures is missing or damaged.
    """
    found = []
    for record, folder in records:
        if record.tokens is None or record.cell.metric != metric or not record.ok or is_exact(record.cell):
            continue
        tokens: Tokens = load(folder / record.tokens.file, record.tokens.sha256)
        cell = record.cell
        found.append(
            Course(
                name=cell.named().replace(":", "/", 1),
                model=cell.model,
                text=cell.corpus,
                metric=metric,
                ctx=cell.ctx,
                chunks=tokens.chunks,
                kld=kl_divergence(tokens.kld),
                spans=tuple(over_position(tokens, cell.ctx, min(spans, tokens.kld.shape[1]))),
            )
        )
    if not found:
        raise IncompleteError(
            f"no record of the metric {metric} has figures of each token",
            f"measure with `turbo-eval sweep --metrics {metric}`",
        )
    return sorted(found, key=lambda c: (c.model, c.text, c.name, c.ctx, c.chunks))


def draw(found: Sequence[Course]) -> Any:
    """A matplotlib figure: on the left the mean over context length where there are several, on the right
    KLD over the distance from the start at the longest. Of one model and text."""
    from matplotlib.figure import Figure  # noqa: PLC0415 takes a second to load

    caches = list(dict.fromkeys(c.name for c in found))
    several = len({c.ctx for c in found}) > 1
    figure = Figure(figsize=(10 if several else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    longest = max(c.ctx for c in found)
    for number, name in enumerate(caches):
        own = [c for c in found if c.name == name]
        color = f"C{number % 10}"
        if several:
            _line(axes[0], [c.ctx for c in own], [c.kld for c in own], name, color)
        last = [c for c in own if c.ctx == longest]
        if last:
            middle = [(s.first + s.last) / 2 for s in last[-1].spans]
            _line(axes[-1], middle, [s.kld for s in last[-1].spans], name, color)
    if several:
        axes[0].set_xscale("log", base=2)
        axes[0].set_xlabel("tokens of context")
    axes[-1].set_xlabel(f"tokens from the start, at {longest}")
    for axis in axes:
        axis.set_ylabel("KL divergence from f16, nats")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    return figure


def _line(axis: Any, x: Sequence[float], spans: Sequence[Interval], name: str, color: str) -> None:
    axis.plot(x, [s.value for s in spans], marker="o", markersize=3, label=name, color=color)
    if all(math.isfinite(s.low) and math.isfinite(s.high) for s in spans):
        axis.fill_between(x, [s.low for s in spans], [s.high for s in spans], alpha=0.15, color=color)
