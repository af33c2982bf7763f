"""From a model and a text to a profile: calibrate, measure each layer, allocate, verify elsewhere, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from turbo_eval import __version__
from turbo_eval.anchor.calibrate import calibrate
from turbo_eval.errors import RegressionError, UsageError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.kv_profile import Profile, model_shape, read_statistics, write_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.tune.allocate import Allocation, Front, Side, noise
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


def tune(
    model: ModelFile, corpus: CorpusFile, build: Build, out: Path, settings: Settings, on_step: OnStep
) -> Tuned:
    """Write `out`.

    The first half of the corpus finds the types, the second half judges them.

    Raises:
        UsageError: layers that differ in size or have no cache, or fewer bits than the smallest type has.
        RegressionError: no types meet `max_kld`; the nearest is named.
        EnvironmentProblem: a tool failed.
    """
    shape = model_shape(model.path)
    info = model.gguf
    folder = out.with_suffix(".tune")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found_on, judged_on = _halves(corpus, folder)
    n = shape.n_layer
    total = 1 + 1 + 2 * n + 5
    step = 0

    def tick(what: str) -> None:
        nonlocal step
        step += 1
        on_step(step, total, what)

    tick("calibrate K and Q")
    calibration = folder / f"{model.sha256[:12]}-{corpus.sha256[:12]}.kv-anchor.gguf"
    if not calibration.is_file():
        calibrate(
            model, replace(corpus, path=found_on), build, calibration,
            ctx=512, chunks=16, threads=settings.threads,
        )  # fmt: skip
    plain = Profile(
        (START,) * n, (START,) * n, settings.recent, settings.first, statistics=read_statistics(calibration)
    )

    def text(path: Path) -> Text:
        return Text(
            build, model.path, model.sha256, path, folder,
            ctx=settings.ctx, chunks=settings.chunks, threads=settings.threads,
        )  # fmt: skip

    tuning, judging = text(found_on), text(judged_on)

    def of_profile(where: Text, profile: Profile) -> Divergence:
        file = folder / "cell.gguf"
        write_profile(profile, shape, file)
        return where.measure(["--kv-profile", str(file)], file.read_bytes())

    tick(f"{START} in every layer")
    base = of_profile(tuning, plain).mean
    k_sides: list[Side] = []
    v_sides: list[Side] = []
    for layer in range(n):
        tick(f"K of layer {layer} in {K_RAISED}")
        kld = of_profile(tuning, replace(plain, k=_with(plain.k, layer, K_RAISED))).mean
        k_sides.append(_side(info.n_head_kv * info.head_dim_k, kld - base, K_RAISED))
    for layer in range(n):
        tick(f"V of layer {layer} in {V_LOWERED}")
        kld = of_profile(tuning, replace(plain, v=_with(plain.v, layer, V_LOWERED))).mean
        v_sides.append(_side(info.n_head_kv * info.head_dim_v, kld - base, V_LOWERED))
    front = Front(k_sides, v_sides)
    # What doesn't add up: the window, and the noise of one layer that the next ones change.
    at_start = sum(side.sensitivity for side in [*k_sides, *v_sides]) * noise(START)
    scale = base / at_start if at_start > 0 else 1.0

    def verify(allocation: Allocation) -> tuple[Profile, Divergence]:
        profile = replace(plain, k=allocation.k, v=allocation.v, bits=allocation.bits)
        return profile, of_profile(judging, profile)

    tick("the profile, on text that was held out")
    profile, held_out, allocation = _search(front, scale, settings, verify)
    rows = [Row(out.name, allocation.bits, held_out)]
    for k, v, bits, window in (
        ("turbo3", "turbo3", 3.25, True),
        ("turbo4", "turbo4", 4.25, True),
        ("q4_0", "q4_0", 4.5, False),
        ("q8_0", "q8_0", 8.5, False),
    ):
        tick(f"{k}/{v}, on text that was held out")
        if window:
            cost = of_profile(judging, replace(plain, k=(k,) * n, v=(v,) * n))
        else:
            cost = judging.measure(["-ctk", k, "-ctv", v, "--kv-recent", "0", "--kv-first", "0"])
        rows.append(Row(f"{k}/{v}" + (" + window" if window else ""), bits, cost))
    predicted = allocation.predicted * scale
    write_profile(
        replace(
            profile,
            predicted=predicted,
            held_out=max(0.0, held_out.mean),
            provenance=_provenance(model, corpus, build, settings),
        ),
        shape,
        out,
    )
    return Tuned(out, allocation, predicted, held_out, tuple(rows))


def _with(types: Sequence[str], layer: int, name: str) -> tuple[str, ...]:
    return tuple(name if i == layer else t for i, t in enumerate(types))


def _side(values: int, change: float, name: str) -> Side:
    """From the change of the divergence when START becomes `name`; a sign that can't be is chance."""
    return Side(values, max(0.0, change / (noise(name) - noise(START))))


def _search(
    front: Front,
    scale: float,
    settings: Settings,
    verify: Callable[[Allocation], tuple[Profile, Divergence]],
) -> tuple[Profile, Divergence, Allocation]:
    """The allocation for the bits, or of the fewest bits that keeps the bound where it is judged."""
    if settings.bits is not None:
        allocation = front.at(settings.bits)
        return *verify(allocation), allocation
    assert settings.max_kld is not None
    bits, nearest = 2.25, None
    while bits <= 8.5:
        allocation = front.at(bits)
        if allocation.predicted * scale <= settings.max_kld or bits == 8.5:
            profile, kld = verify(allocation)
            if nearest is None or kld.mean < nearest[0]:
                nearest = (kld.mean, allocation.bits)
            if kld.mean <= settings.max_kld:
                return profile, kld, allocation
        bits += 0.125
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
