"""Two records that scored the same tokens, as the paired tests take them."""

from __future__ import annotations

from dataclasses import dataclass

from turbo_eval.evidence import paired
from turbo_eval.records.record import Record
from turbo_eval.records.reference import is_exact

# What a verdict is about where nobody says otherwise: a change of perplexity by this many percent, and the
# chance of a wrong verdict.
MARGIN = 1.0
ERROR_RATE = 0.05


@dataclass(frozen=True)
class Paired:
    """ln(PPL / PPL of the reference) of each chunk, on the same tokens; `sequential`: see ByChunk."""

    log_ratio: tuple[float, ...]
    sequential: bool

    def decide(self, margin_pct: float, alpha: float = ERROR_RATE) -> paired.Decision:
        """The verdict on this pair alone."""
        return paired.decide(self.log_ratio, margin_pct, alpha, sequential=self.sequential)

    def interval(self) -> paired.Interval:
        """ΔPPL in percent with its interval of 95 %."""
        found = paired.sequence if self.sequential else paired.interval
        return found(self.log_ratio).percent()


def pairing(record: Record, reference: Record) -> Paired | None:
    """What the paired tests need; None where one of the two has no figures of each token."""
    own, other = record.by_chunk, reference.by_chunk
    if own is None:
        return None
    base = own.base_nll if is_exact(reference.cell) else other.nll if other is not None else ()
    if len(base) != len(own.nll):
        return None
    sequential = own.sequential or (other is not None and other.sequential)
    return Paired(tuple(x - y for x, y in zip(own.nll, base, strict=True)), sequential)
