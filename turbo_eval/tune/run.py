"""From a model and a text to a profile: calibrate, measure each layer, allocate, choose, judge, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from turbo_eval import __version__
from turbo_eval.errors import RegressionError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.kv_profile import Profile, write_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.tune.allocate import CAREFUL, LADDER, Allocation, Front, Side, power, predict
from turbo_eval.tune.measure import Cache, Divergence, Text, evaluated
from turbo_eval.tune.prepare import WEIGHTS, Bench, OnStep, Plan, prepare, twice

# The type in which one layer is measured, all others exact; and one in which all layers are measured at once:
# how the divergence goes from type to type.
K_PROBE, V_PROBE = "turbo3", "turbo2"
K_BETTER, V_BETTER = "turbo4", "turbo3"
EXACT = "f16"
WHAT = "each layer's K and V alone"
# Of which allocations the best is taken: how much more K weighs than was measured, and the types for K.
VARIANTS = ((1.0, LADDER), (1.0, CAREFUL), (2.0, LADDER), (0.5, CAREFUL))
TOP_BITS = cache_type(LADDER[-1]).bpv
LEAST_BITS = cache_type(LADDER[0]).bpv
_TRIED = 5  # profiles, half a bit from the first to the last
_STEPS = tuple(LEAST_BITS + i / 8 for i in range(int((TOP_BITS - LEAST_BITS) * 8) + 1))


@dataclass(frozen=True)
class Goal:
    """`bits` a value at most, or the fewest that keep a bound on text that was held out.

    `max_kld`: mean KL divergence, nats; `max_delta_ppl`: percent, at the upper end of its 95 % interval.
    """

    bits: float | None = None
    max_kld: float | None = None
    max_delta_ppl: float | None = None

    @property
    def tried(self) -> int:
        """Profiles that are judged at once."""
        return 1 if self.bits is not None else _TRIED

    def met(self, found: Divergence) -> bool:
        if self.max_kld is not None:
            return found.mean <= self.max_kld
        if self.max_delta_ppl is not None:
            return found.delta_pct + 1.96 * found.delta_err_pct <= self.max_delta_ppl
        return True

    def __str__(self) -> str:
        if self.max_kld is not None:
            return f"a KL divergence within {self.max_kld:g}"
        return f"ΔPPL within {self.max_delta_ppl:g} %"

    def missed(self, found: Divergence) -> float:
        """By how much, for the nearest."""
        return found.mean if self.max_kld is not None else found.delta_pct + 1.96 * found.delta_err_pct


@dataclass(frozen=True)
class Row:
    """A cache on the text that was held out. `bits` a value, the window not counted.

    "by layer": a profile of other bits that was tried for a bound.
    """

    name: str
    bits: float
    kld: Divergence


@dataclass(frozen=True)
class Tuned:
    """The file that was written, and what it is compared with.

    `front`: bits and predicted divergence of the best allocations; `what`: what was measured, in words.
    """

    path: Path
    allocation: Allocation
    predicted: float
    held_out: Divergence
    rows: tuple[Row, ...]
    front: tuple[tuple[float, float], ...]
    what: str


def tune(
    model: ModelFile, corpus: CorpusFile, build: Build, out: Path, plan: Plan, goal: Goal, on_step: OnStep
) -> Tuned:
    """Write `out`.

    The first half of the corpus finds the types, the second half judges them.

    Raises:
        UsageError: the corpus is one line, or fewer bits than the smallest type has.
        RegressionError: no types meet the goal; the nearest is named.
        EnvironmentProblem: a tool failed.
    """
    plan = replace(plan, tried=goal.tried)
    bench = prepare(model, corpus, build, out.with_suffix(".tune"), plan, on_step)
    k_sides, v_sides, scale = _sensitivities(bench, model)
    large = out.with_suffix(".tune") / WEIGHTS  # quickly made again
    try:
        found = _search(k_sides, v_sides, bench, goal, scale)
    except RegressionError:
        large.unlink(missing_ok=True)
        raise
    rows = (Row(out.name, found.allocation.bits, found.held_out), *found.beside)
    final = replace(
        found.profile,
        predicted=found.allocation.predicted * scale,
        held_out=max(0.0, found.held_out.mean),
        provenance=_provenance(model, corpus, build, bench),
    )
    write_profile(final, bench.shape, out)
    large.unlink(missing_ok=True)
    front, judged = Front(k_sides, v_sides), bench.judging.extent
    steps = [front.at(bits) for bits in _STEPS]
    return Tuned(
        path=out,
        allocation=found.allocation,
        predicted=found.allocation.predicted * scale,
        held_out=found.held_out,
        rows=rows,
        front=tuple((step.bits, step.predicted * scale) for step in steps),
        what=f"weights {bench.weights}, found on {bench.found_on}, judged on {judged} tokens",
    )


def _measure(bench: Bench, text: Text, caches: Sequence[Cache], what: str) -> list[Divergence]:
    """As `Text.measure`, heard of."""
    bench.progress(what)
    each = evaluated(len(caches), text.extent, text.at_once) / len(caches)
    return text.measure(caches, lambda n, seconds: bench.progress(what, n * each, seconds))


def _sensitivities(bench: Bench, model: ModelFile) -> tuple[list[Side], list[Side], float]:
    """What K and V of each layer cost, and the factor from the sum over layers to what they cost together.

    What llama.cpp computes differently even where nothing is quantized (`floor`) is none of a layer's cost.
    """
    n, info = bench.shape.n_layer, model.gguf

    def alone(k: tuple[str, ...], v: tuple[str, ...]) -> Profile:
        # a window of 8 bits is less exact than the 16 bits of all other layers: K without the anchor, which a
        # cache of 16 bits leaves off, may lose more in it than a layer's V costs
        return replace(bench.profile(k, v), recent_type=EXACT)

    exact = (EXACT,) * n
    groups = [range(i, min(i + bench.v_together, n)) for i in range(0, n, bench.v_together)]
    caches = [
        alone(exact, exact),
        bench.profile((K_PROBE,) * n, (K_PROBE,) * n),
        alone((K_BETTER,) * n, exact),
        alone(exact, (V_BETTER,) * n),
        *(alone(_at([layer], K_PROBE, n), exact) for layer in range(n)),
        *(alone(exact, _at(group, V_PROBE, n)) for group in groups),
    ]
    floor, together, *rest = [d.mean for d in _measure(bench, bench.finding, caches, WHAT)]
    k_better, v_better, *costs = [max(cost - floor, 0.0) for cost in rest]
    layers, v_costs = costs[:n], costs[n:]
    k_known = [{K_PROBE: cost} for cost in layers]
    v_known = [
        {V_PROBE: cost / len(group)} for group, cost in zip(groups, v_costs, strict=True) for _ in group
    ]
    # the costliest take most of the bits, and what a better type leaves of their cost differs tenfold
    top = sorted(range(n), key=lambda layer: -layers[layer])[: twice(n)]
    again = _measure(bench, bench.finding, [alone(_at([layer], K_BETTER, n), exact) for layer in top], WHAT)
    for layer, found in zip(top, again, strict=True):
        k_known[layer][K_BETTER] = min(max(found.mean - floor, 0.0), layers[layer])

    k_power = power(K_PROBE, K_BETTER, sum(layers), k_better)
    v_power = power(V_PROBE, V_BETTER, sum(v_costs), v_better)
    k_sides = [Side.measured(info.n_head_kv * info.head_dim_k, known, k_power) for known in k_known]
    v_sides = [Side.measured(info.n_head_kv * info.head_dim_v, known, v_power) for known in v_known]
    total = predict((K_PROBE,) * n, (K_PROBE,) * n, k_sides, v_sides)
    return k_sides, v_sides, together / total if total > 0 else 1.0


def _at(layers: Sequence[int], name: str, n: int) -> tuple[str, ...]:
    return tuple(name if i in layers else EXACT for i in range(n))


@dataclass(frozen=True)
class _Found:
    profile: Profile
    allocation: Allocation
    held_out: Divergence
    beside: tuple[Row, ...]


def _search(
    k_sides: Sequence[Side], v_sides: Sequence[Side], bench: Bench, goal: Goal, scale: float
) -> _Found:
    """The allocation for the bits, or of the fewest bits that keeps the bound where it is judged."""
    if goal.bits is not None:
        return _judge([_chosen(k_sides, v_sides, goal.bits, bench)[0]], bench)[0]
    plain = Front(k_sides, v_sides)
    bound = goal.max_kld if goal.max_kld is not None else (goal.max_delta_ppl or 0.0) / 100
    last = len(_STEPS)
    likely = next((i for i, b in enumerate(_STEPS) if plain.at(b).predicted * scale <= bound), last - 1)
    best = _chosen(k_sides, v_sides, _STEPS[likely], bench)[1]

    def at(bits: float) -> Allocation:
        found = (best if bits >= best.fewest else plain).at(bits)
        return replace(found, predicted=predict(found.k, found.v, k_sides, v_sides))

    low, high = max(0, likely - 2), min(last, max(0, likely - 2) + _TRIED)
    others: dict[float, Row] = {}
    while True:
        tried = _judge([at(bits) for bits in _STEPS[low:high]], bench)
        others |= {f.allocation.bits: Row("by layer", f.allocation.bits, f.held_out) for f in tried}
        good = [found for found in tried if goal.met(found.held_out)]
        if good and (good[0] is not tried[0] or low == 0):
            del others[good[0].allocation.bits]
            return replace(good[0], beside=(*(others[bits] for bits in sorted(others)), *good[0].beside))
        if not good and high == last:
            nearest = min(tried, key=lambda found: goal.missed(found.held_out))
            raise RegressionError(
                f"no types keep {goal}; the nearest has {goal.missed(nearest.held_out):.5f}"
                f" at {nearest.allocation.bits:.2f} bits a value"
            )
        # the next fewer, the fewest that was good among them; or the next more
        low, high = (max(0, low - 4), low + 1) if good else (high, min(last, high + 6))


def _chosen(
    k_sides: Sequence[Side], v_sides: Sequence[Side], bits: float, bench: Bench
) -> tuple[Allocation, Front]:
    """Of what the variants lead to, and one type everywhere, the best on the text that finds the types.

    Its front comes with it.
    """
    fronts = [Front([side.times(tilt) for side in k_sides], v_sides, ladder) for tilt, ladder in VARIANTS]
    found = [(front.at(bits), front) for front in fronts if bits >= front.fewest]
    uniform = max((t for t in LADDER if cache_type(t).bpv <= bits), key=lambda t: cache_type(t).bpv)
    n = len(k_sides)
    found.append((Allocation((uniform,) * n, (uniform,) * n, cache_type(uniform).bpv, 0.0), fronts[0]))
    options = [
        (replace(a, predicted=predict(a.k, a.v, k_sides, v_sides)), front)
        for a, front in {(a.k, a.v): (a, front) for a, front in reversed(found)}.values()
    ]
    if len(options) == 1:
        return options[0]
    profiles = [bench.profile(a.k, a.v) for a, _ in options]
    klds = _measure(bench, bench.choosing, profiles, f"{len(options)} allocations of {bits:g} bits")
    return min(zip(options, klds, strict=True), key=lambda each: each[1].mean)[0]


def _judge(options: Sequence[Allocation], bench: Bench) -> list[_Found]:
    """On text that was held out, beside what one would use otherwise."""
    profiles = [replace(bench.profile(a.k, a.v), bits=a.bits) for a in options]
    rivals = _rivals(bench)
    klds = _measure(bench, bench.judging, [*profiles, *rivals.values()], "on text that was held out")
    rows = tuple(
        Row(name, cache_type(name.split("/")[0]).bpv, kld)
        for name, kld in zip(rivals, klds[len(profiles) :], strict=True)
    )
    return [_Found(*each, rows) for each in zip(profiles, options, klds[: len(profiles)], strict=True)]


def _rivals(bench: Bench) -> dict[str, Cache]:
    """Uniform pairs with the window, llama.cpp's own types without it."""
    n = bench.shape.n_layer
    with_window = {
        f"{name}/{name} + window": bench.profile((name,) * n, (name,) * n) for name in ("turbo3", "turbo4")
    }
    return with_window | {f"{name}/{name}": f"{name}:{name},recent=0,first=0" for name in ("q4_0", "q8_0")}


def _provenance(model: ModelFile, corpus: CorpusFile, build: Build, bench: Bench) -> dict[str, str]:
    return {
        "model.name": model.name,
        "model.sha256": model.sha256,
        "model.weights": bench.weights,
        "corpus.name": corpus.name,
        "corpus.sha256": corpus.sha256,
        "found_on": bench.found_on,
        "held_out": f"{bench.judging.extent} tokens",
        "llama.tree": build.tree,
        "llama.pin": build.pin,
        "date": datetime.now(UTC).date().isoformat(),
        "generator": f"turbo-eval {__version__}",
    }
