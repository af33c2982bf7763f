"""Records of any settings → the cheapest pair that certainly keeps within a quality bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turbo_eval.analysis.statistics import chunks_to_decide, decided
from turbo_eval.analysis.summary import Summary
from turbo_eval.evidence.paired import sequence
from turbo_eval.formats.cache_types import kv_mib
from turbo_eval.inputs.gguf_info import GgufInfo
from turbo_eval.records.reference import EXACT

# A failure of these kinds says that the pair does not work here, whatever another setting gave. The others
# (a timeout, a text that was too short) say nothing about the pair.
_DAMNING = frozenset(
    {"nan", "crash", "refused", "type-mismatch", "state-mismatch", "cpu-fallback", "decode-mismatch"}
)


@dataclass(frozen=True)
class Bound:
    """Largest mean KL divergence in nats, largest ΔPPL in percent, memory in GiB; None: no bound."""

    max_kld: float | None
    max_delta_ppl: float | None
    memory_gib: float | None


@dataclass(frozen=True)
class Candidate:
    """A pair with the KV memory it takes at the wanted context, and what its figures come to.

    Attributes:
        row: the setting that speaks for it, the one with the most text.
        reasons: why it is out, if it is.
        doubt: why the text cannot decide whether it is within the bound; "" where it can.
    """

    row: Summary
    memory_mib: float
    reasons: tuple[str, ...]
    doubt: str = ""

    @property
    def within(self) -> bool | None:
        """Within the bound? None: its text can't tell."""
        return None if self.doubt else not self.reasons

    @property
    def name(self) -> str:
        """ "K/V" and its exact window, with the anchor where it is not the build's own choice."""
        anchor = self.row.anchor
        return self.row.name + (f" (anchor {anchor})" if _anchor(self.row) not in _OWN else "")

    def figures(self) -> str:
        """Its quality in words, with its error."""
        parts = []
        if self.row.delta is not None:
            parts.append(f"ΔPPL {_figure(self.row.delta.pct, self.row.delta.err_pct, '+.2f')} %")
        kld = _kld(self.row)
        if kld is not None:
            parts.append(f"KLD {_figure(*kld, '.4f')}")
        return ", ".join(parts)

    def source(self) -> str:
        """Where its figures come from."""
        row = self.row
        return f"{row.corpus}, {row.chunks} chunks of {row.ctx} tokens, against {row.against}"


_OWN = ("auto", "")


def _anchor(row: Summary) -> str:
    """The anchor as far as it matters: a K that is not quantized has none."""
    return "" if row.k in ("f16", "f32", "bf16") else row.anchor


def _figure(value: float, error: float | None, form: str) -> str:
    doubt = f" ± {error:{form.lstrip('+')}}" if error else ""
    return f"{value:{form}}{doubt}"


def _kld(row: Summary) -> tuple[float, float | None] | None:
    record = row.get("kld")
    return (record.kld.mean, record.kld.mean_err) if record is not None and record.kld else None


def memory_mib(row: Summary, info: GgufInfo, ctx: int) -> float:
    """KV cache of the pair at `ctx` tokens in MiB.

    Scaled from what llama.cpp reported where it did (right for layers that cache less), else from
    the model's shape.
    """
    for record in row.records:
        state = record.effective
        if record.ok and state.kv_mib and state.ctx and record.cell.metric in ("ppl", "kld", "decode"):
            window = state.window_mib or 0.0  # of the same size at any context
            return (state.kv_mib - window) * ctx / state.ctx + window
    if row.profile is not None:
        return shape_mib(EXACT, info, ctx) * (row.profile.bits_k + row.profile.bits_v) / 32
    return shape_mib((row.k, row.v), info, ctx)


def shape_mib(pair: tuple[str, str], info: GgufInfo, ctx: int) -> float:
    """KV cache of a pair at `ctx` tokens in MiB, from the model's shape."""
    return kv_mib(
        *pair,
        n_layer=info.n_layer,
        n_head_kv=info.n_head_kv,
        dim_k=info.head_dim_k,
        dim_v=info.head_dim_v,
        ctx=ctx,
    )


def recommend(rows: Sequence[Summary], info: GgufInfo, ctx: int, bound: Bound) -> list[Candidate]:
    """Every pair with its memory and verdict, the best first: those certainly within the bound before those
    that the text can't decide and those that are out, then by memory, then by quality.

    Args:
        rows: of any number of settings of one model, build and machine.
    """
    groups: dict[tuple[str, str], list[Summary]] = {}
    for row in rows:
        groups.setdefault((row.name, _anchor(row)), []).append(row)
    found = []
    for group in groups.values():
        row = max(group, key=lambda r: _weight(r, bound))
        size = memory_mib(row, info, ctx)
        reasons, doubt = _judge(row, size, bound)
        failed = next((r for r in group if r is not row and r.status in _DAMNING), None)
        if failed is not None:
            reasons.append(f"it is {failed.status} on {failed.corpus} with {failed.ctx} tokens")
        found.append(Candidate(row, size, tuple(reasons), "" if failed else doubt))
    return sorted(found, key=_order)


def best(ranked: Iterable[Candidate]) -> list[Candidate]:
    """Those certainly within the bound, the cheapest first."""
    return [candidate for candidate in ranked if candidate.within]


def _weight(row: Summary, bound: Bound) -> tuple[int, bool, int]:
    """How much a row says about its pair: the figures asked for, then the length of text."""
    figures = (bound.max_delta_ppl is not None and row.delta is not None) + (
        bound.max_kld is not None and _kld(row) is not None
    )
    return figures, row.status == "ok", row.ctx * row.chunks


def _order(candidate: Candidate) -> tuple[bool, bool, float, float]:
    kld = _kld(candidate.row)
    delta = candidate.row.delta_pct
    loss = kld[0] if kld is not None else delta if delta is not None else math.inf
    return bool(candidate.reasons), bool(candidate.doubt), round(candidate.memory_mib, 3), loss


def _judge(row: Summary, size: float, bound: Bound) -> tuple[list[str], str]:
    """(why the pair is out, why the text can't decide). What was not measured is not within any bound."""
    if row.status != "ok":
        return [f"it is {row.status}"], ""
    reasons: list[str] = []
    doubts: list[str] = []
    if bound.max_delta_ppl is not None:
        if row.delta is None:
            reasons.append(f"its reference {row.against} is not on record, so it has no ΔPPL")
        else:
            text = f"its ΔPPL {_figure(row.delta.pct, row.delta.err_pct, '+.2f')} %"
            gap = bound.max_delta_ppl - row.delta.pct
            if not gap >= 0:
                reasons.append(f"{text} is over {bound.max_delta_ppl:g} %")
            if not row.is_reference:
                sure = row.beyond_doubt(bound.max_delta_ppl)
                doubts.append("" if sure else _doubt(gap, row.delta.err_pct, row))
    if bound.max_kld is not None:
        kld = _kld(row)
        if kld is None:
            reasons.append("its KL divergence was not measured")
        else:
            gap = bound.max_kld - kld[0]
            if not gap >= 0:
                reasons.append(f"its KLD {_figure(*kld, '.4f')} is over {bound.max_kld:g}")
            if not row.is_reference:
                sure = _kld_decided(row, bound.max_kld, kld)
                doubts.append("" if sure else _doubt(gap, kld[1], row))
    if bound.memory_gib is not None and not size <= bound.memory_gib * 1024:
        return [*reasons, f"its KV cache of {size:.0f} MiB does not fit {bound.memory_gib:g} GiB"], ""
    if bound.max_delta_ppl is None and bound.max_kld is None:
        return reasons, ""
    certain = any(not d for d in doubts) and bool(reasons)  # out for one reason that is beyond doubt
    return reasons, "" if certain else next((d for d in doubts if d), "")


def _kld_decided(row: Summary, limit: float, kld: tuple[float, float | None]) -> bool:
    """Is the KL divergence certainly on the side of the limit where it lies?"""
    record = row.get("kld")
    chunks = record.by_chunk if record is not None else None
    if chunks is not None and chunks.sequential:
        found = sequence(chunks.kld)
        return not found.low <= limit <= found.high
    # with figures of each token its error is that over chunks
    return decided(limit - kld[0], kld[1], row.chunks - 1 if row.paired is not None else 1000)


def _doubt(gap: float, error: float | None, row: Summary) -> str:
    """Why a figure this far from its limit decides nothing."""
    if error is None:
        return "its error is not known; measure it with --metrics kld, or on more chunks"
    more = chunks_to_decide(gap, error, row.chunks)
    return f"too close: {f'about {more}' if more else 'very many'} more chunks would tell"


def oddities(candidates: Sequence[Candidate]) -> list[str]:
    """Pairs with more bits than another of the same setting that are worse all the same, in sentences."""
    said = []
    rows = [c for c in candidates if c.row.status == "ok" and c.row.delta is not None]
    for a in rows:
        for b in rows:
            x, y = a.row, b.row
            same = (x.corpus, x.ctx, x.chunks, _anchor(x)) == (y.corpus, y.ctx, y.chunks, _anchor(y))
            same = same and x.window == y.window
            more = x.bpv_k >= y.bpv_k and x.bpv_v >= y.bpv_v and x.bpv > y.bpv
            assert x.delta is not None and y.delta is not None
            gap = x.delta.pct - y.delta.pct
            if not (same and more and gap > 0) or (x.k, x.v) == EXACT:
                continue
            errors = (x.delta.err_pct, y.delta.err_pct)
            apart = None if None in errors else math.hypot(*(e or 0.0 for e in errors))
            why = "beyond the error" if decided(gap, apart) else "within the error: noise of a short text"
            said.append(
                f"not monotonic: {a.name} has more bits than {b.name}, yet its ΔPPL is larger"
                f" ({x.delta.pct:+.2f} against {y.delta.pct:+.2f} %), {why}"
            )
    return said
