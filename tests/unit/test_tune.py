"""The allocation of bits: exact, within its budget, and monotone."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from turbo_eval.errors import UsageError
from turbo_eval.tune.allocate import CAREFUL, LADDER, Front, Side, bits_per_value, noise, power, predict


def sides(seed: int, layers: int, values: int) -> tuple[list[Side], list[Side]]:
    rng = np.random.default_rng(seed)
    k, v = rng.lognormal(0.0, 1.5, (2, layers))
    return [measured(values, x) for x in k], [measured(values, x / 4) for x in v]


def measured(values: int, cost: float, power: float = 1.5) -> Side:
    return Side.measured(values, {"turbo3": cost}, power)


@pytest.mark.parametrize("ladder", [LADDER, CAREFUL])
@pytest.mark.parametrize("bits", [2.75, 3.0, 3.25, 4.25, 6.0, 8.5])
def test_nothing_is_better(bits: float, ladder: tuple[str, ...]) -> None:
    k_sides, v_sides = sides(1, 2, 128)
    found = Front(k_sides, v_sides, ladder).at(bits)
    best = min(
        predict(types[:2], types[2:], k_sides, v_sides)
        for types in product(ladder, ladder, LADDER, LADDER)
        if bits_per_value(types[:2], types[2:], [128] * 2, [128] * 2) <= bits
    )
    assert found.predicted == pytest.approx(best)
    assert found.predicted == pytest.approx(predict(found.k, found.v, k_sides, v_sides))
    assert found.bits <= bits


def test_layers_of_several_sizes_count_by_their_values() -> None:
    k_sides, v_sides = ([measured(256, 1.0), measured(128, 1.0)] for _ in "kv")
    found = Front(k_sides, v_sides).at(3.0)
    assert found.bits == pytest.approx(bits_per_value(found.k, found.v, [256, 128], [256, 128]))
    assert found.bits <= 3.0


def test_more_bits_are_never_worse() -> None:
    front = Front(*sides(2, 8, 128))
    predicted = [front.at(bits).predicted for bits in np.arange(2.75, 8.6, 0.25)]
    assert predicted == sorted(predicted, reverse=True)
    assert front.at(8.5).k == ("q8_0",) * 8


def test_a_layer_that_does_not_matter_gets_the_least() -> None:
    k_sides, v_sides = sides(3, 4, 64)
    v_sides[2] = measured(64, 0.0)
    assert Front(k_sides, v_sides).at(3.25).v[2] == "turbo2"


def test_fewer_bits_than_there_are() -> None:
    with pytest.raises(UsageError, match="less than K in turbo3 and V in turbo2 have"):
        Front(*sides(4, 2, 64), CAREFUL).at(2.5)
    with pytest.raises(UsageError, match="less than K in turbo2 and V in turbo2 have"):
        Front(*sides(4, 2, 64)).at(2.0)


def test_what_a_type_costs_grows_with_a_power_of_its_error() -> None:
    costs = measured(64, 0.006, 1.5).costs
    assert costs["turbo3"] == pytest.approx(0.006)
    assert power("turbo3", "turbo4", costs["turbo3"], costs["turbo4"]) == pytest.approx(1.5)
    assert power("turbo2", "turbo4", costs["turbo2"], costs["turbo4"]) == pytest.approx(1.5)
    assert power("turbo3", "turbo4", 1.0, noise("turbo4") / noise("turbo3") * 3) == 1.0
    assert power("turbo3", "turbo4", 1.0, 1e-9) == 2.0
    assert power("turbo3", "turbo4", 1.0, 0.0) == power("turbo3", "turbo4", 0.0, 0.0) == 1.0


def test_what_was_measured_counts_and_the_nearest_type_tells_of_the_others() -> None:
    one, two = measured(64, 0.006), Side.measured(64, {"turbo3": 0.006, "turbo4": 0.0001}, 1.5)
    assert (two.costs["turbo3"], two.costs["turbo4"]) == (0.006, 0.0001)
    assert two.costs["turbo2"] == one.costs["turbo2"]
    assert two.costs["q5_0"] == pytest.approx(0.0001 * (noise("q5_0") / noise("turbo4")) ** 1.5)
