"""The best types for a number of bits, from how much each layer's K and V matter.

A layer's K or V is measured in a type or two, all else exact. That tells what every type costs there: the
divergence goes with a power of the type's mean squared error. The power is 1 where noise is small. Noise in K
that moves logits by more than about 1 costs more than that (softmax is an exponential), so the power is
measured, for K and for V. Sums over layers hold as long as the divergence is small; what is found is
measured, not believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import cache_type

LADDER = ("turbo2", "turbo3", "turbo4", "q5_0", "q8_0")
# Two bits are enough for K of a layer that hardly matters. Elsewhere their error isn't small and nothing adds
# up: what is allocated with them has to be compared with what is allocated without.
CAREFUL = LADDER[1:]
_UNITS = 4  # a quarter of a bit: the types' bits are multiples of it


@dataclass(frozen=True)
class Side:
    """K or V of one layer: `values` a token; `costs`: divergence in nats by type."""

    values: int
    costs: Mapping[str, float]

    @classmethod
    def measured(cls, values: int, known: Mapping[str, float], power: float) -> Side:
        """From what it costs in some types; each other type follows from the one whose error is nearest."""

        def cost(name: str) -> float:
            ratios = {t: noise(name) / noise(t) for t in known}
            nearest = min(ratios, key=lambda t: abs(math.log(ratios[t])))
            return known[nearest] * math.pow(ratios[nearest], power)

        return cls(values, {t: cost(t) for t in LADDER})

    def times(self, factor: float) -> Side:
        return Side(self.values, {t: factor * cost for t, cost in self.costs.items()})


def power(worse: str, better: str, cost: float, less: float) -> float:
    """Of the divergence over the squared error, from what two types cost. 1 to 2: a type further off would be
    out of proportion otherwise."""
    if not 0 < less < cost:
        return 1.0
    return min(2.0, max(1.0, math.log(cost / less) / math.log(noise(worse) / noise(better))))


@dataclass(frozen=True)
class Allocation:
    """`k` and `v`: types by layer; `bits` a value; `predicted`: KL divergence in nats."""

    k: tuple[str, ...]
    v: tuple[str, ...]
    bits: float
    predicted: float


def noise(name: str) -> float:
    """Relative mean squared error of a type on Gaussians."""
    mse = cache_type(name).mse
    assert mse is not None
    return mse


def bits_per_value(
    k: Sequence[str], v: Sequence[str], k_values: Sequence[int], v_values: Sequence[int]
) -> float:
    """Mean over all values of K and V."""
    bits = sum(
        n * cache_type(t).bpv for t, n in [*zip(k, k_values, strict=True), *zip(v, v_values, strict=True)]
    )
    return bits / (sum(k_values) + sum(v_values))


def predict(k: Sequence[str], v: Sequence[str], k_sides: Sequence[Side], v_sides: Sequence[Side]) -> float:
    """KL divergence in nats if the sides' contributions add up."""
    sides = [*zip(k, k_sides, strict=True), *zip(v, v_sides, strict=True)]
    return sum(side.costs[t] for t, side in sides)


class Front:
    """The types with the least predicted divergence for every number of bits, by dynamic programming."""

    def __init__(
        self, k_sides: Sequence[Side], v_sides: Sequence[Side], k_ladder: Sequence[str] = LADDER
    ) -> None:
        self._k, self._v, self._least = k_sides, v_sides, k_ladder[0]
        sides = [*k_sides, *v_sides]
        unit = min(side.values for side in sides)
        if any(side.values % unit for side in sides):
            unit = 1
        self._weight = sum(side.values // unit for side in sides)
        top = round(cache_type(LADDER[-1]).bpv * _UNITS) * self._weight
        # best[b]: divergence and choices of the sides so far with at most b units
        best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] * (top + 1)
        for side, ladder in [*((s, k_ladder) for s in k_sides), *((s, LADDER) for s in v_sides)]:
            weight = side.values // unit
            cost = [round(cache_type(t).bpv * _UNITS) * weight for t in ladder]
            after: list[tuple[float, tuple[int, ...]] | None] = [None] * (top + 1)
            for b in range(top + 1):
                options = [
                    (before[0] + side.costs[t], LADDER.index(t), before[1])
                    for t, c in zip(ladder, cost, strict=True)
                    if b >= c and (before := best[b - c]) is not None
                ]
                if options:
                    kld, i, choices = min(options, key=lambda option: option[0])
                    after[b] = (kld, (*choices, i))
            best = after
        self._best = best

    @property
    def fewest(self) -> float:
        """Bits a value that it takes at least."""
        n_k, n_v = (sum(side.values for side in sides) for sides in (self._k, self._v))
        return (n_k * cache_type(self._least).bpv + n_v * cache_type(LADDER[0]).bpv) / (n_k + n_v)

    def at(self, bits: float) -> Allocation:
        """At no more than `bits` a value.

        Raises:
            UsageError: fewer than the smallest type has.
        """
        budget = min(int(bits * _UNITS * self._weight + 1e-6), len(self._best) - 1)
        found = self._best[max(budget, 0)]
        if found is None:
            raise UsageError(
                f"{bits} bits a value are less than K in {self._least} and V in {LADDER[0]} have",
                "ask for more",
            )
        types = tuple(LADDER[i] for i in found[1])
        k, v = types[: len(self._k)], types[len(self._k) :]
        spent = bits_per_value(k, v, [s.values for s in self._k], [s.values for s in self._v])
        return Allocation(k, v, spent, found[0])
