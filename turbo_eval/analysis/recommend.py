"""Records → the cheapest pair that keeps within a quality bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turbo_eval.analysis.table import Summary
from turbo_eval.formats.cache_types import kv_mib
from turbo_eval.inputs.gguf_info import GgufInfo


@dataclass(frozen=True)
class Bound:
    """Largest mean KL divergence in nats, largest ΔPPL in percent, memory in GiB; None: no bound."""

    max_kld: float | None
    max_delta_ppl: float | None
    memory_gib: float | None


@dataclass(frozen=True)
class Candidate:
    """A pair with the KV memory it takes at the wanted context and why it is out, if it is."""

    row: Summary
    memory_mib: float
    reasons: tuple[str, ...]

    def figures(self) -> str:
        """Its quality in words."""
        parts = []
        if self.row.delta_pct is not None:
            parts.append(f"ΔPPL {self.row.delta_pct:+.2f} %")
        record = self.row.get("kld")
        if record is not None and record.kld is not None:
            parts.append(f"KLD {record.kld.mean:.4f}")
        return ", ".join(parts)


def memory_mib(row: Summary, info: GgufInfo, ctx: int) -> float:
    """KV cache of the pair at `ctx` tokens in MiB.

    Scaled from what llama.cpp reported where it did (right for layers that cache less), else from
    the model's shape.
    """
    for record in row.records:
        state = record.effective
        if record.ok and state.kv_mib and state.ctx and record.cell.metric in ("ppl", "kld", "decode"):
            return state.kv_mib * ctx / state.ctx
    return kv_mib(
        row.k,
        row.v,
        n_layer=info.n_layer,
        n_head_kv=info.n_head_kv,
        dim_k=info.head_dim_k,
        dim_v=info.head_dim_v,
        ctx=ctx,
    )


def recommend(rows: Sequence[Summary], info: GgufInfo, ctx: int, bound: Bound) -> list[Candidate]:
    """Every pair with its memory and verdict, the best first: those within the bound before the
    others, then by memory, then by quality."""
    candidates = []
    for row in rows:
        size = memory_mib(row, info, ctx)
        candidates.append(Candidate(row, size, tuple(_reasons(row, size, bound))))
    return sorted(candidates, key=_order)


def _order(candidate: Candidate) -> tuple[bool, float, float]:
    row = candidate.row
    record = row.get("kld")
    if record is not None and record.kld is not None:
        loss = record.kld.mean
    else:
        loss = abs(row.delta_pct) if row.delta_pct is not None else float("inf")
    return bool(candidate.reasons), round(candidate.memory_mib, 3), loss


def _reasons(row: Summary, size: float, bound: Bound) -> list[str]:
    """Why the pair is out. What was not measured is not within any bound."""
    if row.status != "ok":
        return [f"it is {row.status}"]
    reasons = []
    if bound.max_delta_ppl is not None:
        if row.delta_pct is None:
            reasons.append("there is no baseline to take its ΔPPL against")
        elif row.delta_pct > bound.max_delta_ppl:
            reasons.append(f"its ΔPPL {row.delta_pct:+.2f} % is over {bound.max_delta_ppl:g} %")
    if bound.max_kld is not None:
        record = row.get("kld")
        if record is None or record.kld is None:
            reasons.append("its KL divergence was not measured")
        elif record.kld.mean > bound.max_kld:
            reasons.append(f"its KLD {record.kld.mean:.4f} is over {bound.max_kld:g}")
    if bound.memory_gib is not None and size > bound.memory_gib * 1024:
        reasons.append(f"its KV cache of {size:.0f} MiB does not fit {bound.memory_gib:g} GiB")
    return reasons
