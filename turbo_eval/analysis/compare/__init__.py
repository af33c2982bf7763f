"""Two sets of records → which cells differ beyond noise, and what recorded difference explains it."""

from __future__ import annotations

from dataclasses import dataclass

from turbo_eval.analysis.compare.diagnosis import diagnose, provenance_differences
from turbo_eval.analysis.compare.difference import Difference, differences, speed_differences
from turbo_eval.analysis.compare.match import Side, match, read_side

__all__ = ["ALPHA", "Comparison", "Difference", "Side", "compare", "read_side"]

# Chance, over all numbers together, of calling noise a difference.
ALPHA = 0.01


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, most surprising first.

    `provenance` rows are (what, value of A, value of B); `only_a`, `only_b` name cells that the other
    side lacks.
    """

    a: Side
    b: Side
    differing: tuple[Difference, ...]
    agreeing: tuple[Difference, ...]
    provenance: tuple[tuple[str, str, str], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]
    diagnosis: str


def compare(a: Side, b: Side) -> Comparison:
    """Match the cells of two sides and test each of their numbers.

    Raises:
        IncompleteError: they have no cell in common; says which field parts them.
    """
    matched = match(a, b)
    found = [difference for pair in matched.pairs for difference in differences(*pair)]
    found += [difference for pair in matched.speeds for difference in speed_differences(*pair)]
    tested = max(1, sum(bool(d.delta) for d in found))  # what is equal cannot be a false alarm
    differing = [d for d in found if d.beyond_noise(ALPHA / tested)]
    differing.sort(key=lambda d: (d.status_a == d.status_b, d.p, -abs(d.delta or 0)))
    agreeing = [d for d in found if d not in differing]
    provenance = provenance_differences([*matched.pairs, *matched.speeds])
    return Comparison(
        a=a,
        b=b,
        differing=tuple(differing),
        agreeing=tuple(agreeing),
        provenance=provenance,
        only_a=matched.only_a,
        only_b=matched.only_b,
        notes=matched.notes,
        diagnosis=diagnose(differing, agreeing, provenance),
    )
