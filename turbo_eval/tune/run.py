"""From a model and a text to a profile: calibrate, measure each layer, allocate, verify elsewhere, write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from turbo_eval import __version__
from turbo_eval.anchor.calibrate import calibrate
from turbo_eval.errors import RegressionError, UsageError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.kv_profile import Profile, model_shape, read_statistics, write_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.tune.allocate import Allocation, Front, Side, noise, shrink
from turbo_eval.tune.measure import Divergence, Text
from turbo_eval.util.files import writing

START = "turbo3"  # K and V of the cache in which one layer at a time is changed
K_RAISED, V_LOWERED = "q8_0", "turbo2"

OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """`bits` a value, at most, or `max_kld` in nats; in tokens `ctx` a chunk, `recent` and `first`."""

    bits: float | None
    max_kld: float | None
    ctx: int
    chunks: int
    recent: int = 128
    first: int = 4
    threads: int | None = None


@dataclass(frozen=True)
class Row:
    """A cache on the text that was held out."""

    name: str
    bits: float
    kld: Divergence


@dataclass(frozen=True)
class Tuned:
    """The file that was written, and what it is compared with."""

    path: Path
    allocation: Allocation
    predicted: float
    held_out: Divergence
    rows: tuple[Row, ...]


class _Bench:
    """Where profiles of one model are measured: a text to tune on and one to judge on, window, statistics."""

    def __init__(
        self, model: ModelFile, corpus: CorpusFile, build: Build, folder: Path, settings: Settings
    ) -> None:
        self.shape = model_shape(model.path)
        self._cell = folder / "cell.gguf"
        found_on, judged_on = _halves(corpus, folder)
        calibration = folder / f"{model.sha256[:12]}-{corpus.sha256[:12]}.kv-anchor.gguf"
        if not calibration.is_file():
            half = replace(corpus, path=found_on)
            calibrate(model, half, build, calibration, ctx=512, chunks=16, threads=settings.threads)
        n = self.shape.n_layer
        statistics = read_statistics(calibration)
        self.start = Profile(
            (START,) * n, (START,) * n, settings.recent, settings.first, statistics=statistics
        )
        self.tuning, self.judging = (
            Text(
                build, model.path, model.sha256, half, folder,
                ctx=settings.ctx, chunks=settings.chunks, threads=settings.threads,
            )
            for half in (found_on, judged_on)
        )  # fmt: skip

    def measure(self, text: Text, profile: Profile) -> Divergence:
        write_profile(profile, self.shape, self._cell)
        return text.measure(["--kv-profile", str(self._cell)], self._cell.read_bytes())


def tune(
    model: ModelFile, corpus: CorpusFile, build: Build, out: Path, settings: Settings, on_step: OnStep
) -> Tuned:
    """Write `out`.

    The first half of the corpus finds the types, the second half judges them.

    Raises:
        UsageError: the corpus is one line, or fewer bits than the smallest type has.
        RegressionError: no types meet `max_kld`; the nearest is named.
        EnvironmentProblem: a tool failed.
    """
    folder = out.with_suffix(".tune")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total = 7 + 2 * model.gguf.n_layer
    steps = itertools.count(1)

    def tick(what: str) -> None:
        on_step(next(steps), total, what)

    tick("calibrate K and Q")
    bench = _Bench(model, corpus, build, folder, settings)
    front, scale = _sensitivities(bench, model, tick)
    tick("the profile, on text that was held out")
    profile, held_out, allocation = _search(front, scale, settings, bench)
    rows = (Row(out.name, allocation.bits, held_out), *_rivals(bench, tick))
    predicted = allocation.predicted * scale
    final = replace(
        profile,
        predicted=predicted,
        held_out=max(0.0, held_out.mean),
        provenance=_provenance(model, corpus, build, settings),
    )
    write_profile(final, bench.shape, out)
    return Tuned(out, allocation, predicted, held_out, rows)


def _sensitivities(bench: _Bench, model: ModelFile, tick: Callable[[str], None]) -> tuple[Front, float]:
    """What each side of each layer costs, and the factor from the sum of that to what was measured."""
    info, start = model.gguf, bench.start
    tick(f"{START} in every layer")
    base = bench.measure(bench.tuning, start).mean
    k_cost: list[float] = []
    v_cost: list[float] = []
    for layer in range(bench.shape.n_layer):
        tick(f"K of layer {layer} in {K_RAISED}")
        kld = bench.measure(bench.tuning, replace(start, k=_with(start.k, layer, K_RAISED))).mean
        k_cost.append((kld - base) / (noise(K_RAISED) - noise(START)))
    for layer in range(bench.shape.n_layer):
        tick(f"V of layer {layer} in {V_LOWERED}")
        kld = bench.measure(bench.tuning, replace(start, v=_with(start.v, layer, V_LOWERED))).mean
        v_cost.append((kld - base) / (noise(V_LOWERED) - noise(START)))
    k_sides = [Side(info.n_head_kv * info.head_dim_k, cost) for cost in shrink(k_cost)]
    v_sides = [Side(info.n_head_kv * info.head_dim_v, cost) for cost in shrink(v_cost)]
    # What doesn't add up: the window, and the noise of one layer that the next ones change.
    at_start = sum(side.sensitivity for side in [*k_sides, *v_sides]) * noise(START)
    return Front(k_sides, v_sides), base / at_start if at_start > 0 else 1.0


def _rivals(bench: _Bench, tick: Callable[[str], None]) -> Iterator[Row]:
    """What one would use otherwise: uniform pairs with the window, llama.cpp's own types without it."""
    n = bench.shape.n_layer
    for name in ("turbo3", "turbo4"):
        tick(f"{name}/{name}, on text that was held out")
        uniform = replace(bench.start, k=(name,) * n, v=(name,) * n)
        yield Row(f"{name}/{name} + window", cache_type(name).bpv, bench.measure(bench.judging, uniform))
    for name in ("q4_0", "q8_0"):
        tick(f"{name}/{name}, on text that was held out")
        plain = ["-ctk", name, "-ctv", name, "--kv-recent", "0", "--kv-first", "0"]
        yield Row(f"{name}/{name}", cache_type(name).bpv, bench.judging.measure(plain))


def _with(types: Sequence[str], layer: int, name: str) -> tuple[str, ...]:
    return tuple(name if i == layer else t for i, t in enumerate(types))


def _search(
    front: Front, scale: float, settings: Settings, bench: _Bench
) -> tuple[Profile, Divergence, Allocation]:
    """The allocation for the bits, or of the fewest bits that keeps the bound where it is judged."""
    steps = [settings.bits] if settings.bits is not None else [2.75 + i / 8 for i in range(47)]
    bound = settings.max_kld if settings.max_kld is not None else math.inf
    nearest: tuple[float, float] | None = None
    for bits in steps:
        allocation = front.at(bits)
        if allocation.predicted * scale > bound and bits < steps[-1]:
            continue
        profile = replace(bench.start, k=allocation.k, v=allocation.v, bits=allocation.bits)
        kld = bench.measure(bench.judging, profile)
        if kld.mean <= bound:
            return profile, kld, allocation
        nearest = min(nearest or (math.inf, 0.0), (kld.mean, allocation.bits))
    assert nearest is not None
    raise RegressionError(
        f"no types keep the KL divergence within {settings.max_kld}; the nearest has {nearest[0]:.5f} "
        f"at {nearest[1]:.2f} bits a value"
    )


def _halves(corpus: CorpusFile, folder: Path) -> tuple[Path, Path]:
    """The corpus, cut at the line nearest to its middle."""
    data = corpus.path.read_bytes()
    middle = data.find(b"\n", len(data) // 2) + 1
    if middle <= 0:
        raise UsageError(
            f"{corpus.name} is one line: it can't be cut into text to tune on and text to judge on"
        )
    halves = folder / "found-on.txt", folder / "judged-on.txt"
    for path, part in zip(halves, (data[:middle], data[middle:]), strict=True):
        with writing(path):
            path.write_bytes(part)
    return halves


def _provenance(model: ModelFile, corpus: CorpusFile, build: Build, settings: Settings) -> dict[str, str]:
    return {
        "model.name": model.name,
        "model.sha256": model.sha256,
        "corpus.name": corpus.name,
        "corpus.sha256": corpus.sha256,
        "context_length": str(settings.ctx),
        "chunks": str(settings.chunks),
        "llama.tree": build.tree,
        "llama.pin": build.pin,
        "date": datetime.now(UTC).date().isoformat(),
        "generator": f"turbo-eval {__version__}",
    }
