"""What is measured on, and how much of it: texts, weights, statistics, and a plan that keeps to a budget."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray

from turbo_eval.anchor.calibrate import calibrate
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.kv_profile import ModelShape, Profile, model_shape, read_statistics
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.tune.measure import Extent, Text, evaluated
from turbo_eval.util.files import writing
from turbo_eval.util.process import child_environment, run

APART = 4  # caches beside each layer's K and V: exact, and three of all layers
BETWEEN, RIVALS = 5, 4  # caches that are chosen from, and that the profile is compared with
AT_ONCE = 16  # caches in one process, where memory has room for them
# How the types are found, from the most work to the least: the part of the context, and how many neighbours'
# V is measured together. What lies behind the window costs more in a long context, so a shorter one is a last
# resort; two neighbours' V instead of one cost a few percent.
_FINDING = ((1, 1), (1, 2), (3 / 4, 2), (1 / 2, 2), (3 / 8, 2), (1 / 4, 2))
_CALIBRATION = Extent(512, 8)
_HARDER = 1.35  # what a token of a cache among others takes, over one of the calibration (0.5B, 2048 tokens)
_RESERVE = 0.95  # of a budget; the rest is for starts, sums and files


OnStep = Callable[[float, str, float | None], None]  # share that is done, what comes next, seconds left


@dataclass(frozen=True)
class Plan:
    """`judging`: on how much text profiles are compared; `budget`: seconds for all, None: no limit.

    `recent` and `first` are the exact window's tokens. `tried`: how many profiles are judged.
    """

    judging: Extent
    budget: float | None = None
    recent: int = 128
    first: int = 4
    threads: int | None = None
    tried: int = 1

    def tokens(self, layers: int) -> int:
        """That all contexts together evaluate, if the budget allows all."""
        return _CALIBRATION.tokens + self.work(layers, self._fits()[0])

    def work(self, layers: int, fit: Fit, at_once: int = AT_ONCE) -> int:
        """Tokens that all contexts together evaluate after the calibration."""
        found = (APART + layers + math.ceil(layers / fit.v_together), twice(layers))
        judged = (BETWEEN, self.tried + RIVALS)
        return sum(evaluated(n, fit.finding, at_once) for n in found) + sum(
            evaluated(n, fit.judging, at_once) for n in judged
        )

    def fitted(self, layers: int, seconds_per_token: float, at_once: int = AT_ONCE) -> Fit:
        """The most that the budget allows, else the least there is.

        A run that goes on gets what the interrupted one had: the seconds are the calibration's.
        """
        for fit in self._fits():
            work = _HARDER * self.work(layers, fit, at_once) + _CALIBRATION.tokens
            if self.budget is None or work * seconds_per_token <= _RESERVE * self.budget:
                break
        return fit

    def _fits(self) -> list[Fit]:
        """From the most to the least."""
        whole = self.judging.ctx
        judged = [self.judging, replace(self.judging, chunks=1), Extent(min(whole, 1024), 1)]
        least = min(2 * (self.recent + self.first), whole)
        finding = [(Extent(max(int(whole * share), least), 1), v_together) for share, v_together in _FINDING]
        return [Fit(find, judging, v_together) for find, v_together in finding for judging in judged]


@dataclass(frozen=True)
class Fit:
    """What types are found on, `v_together` layers' V at once, and what profiles are judged on."""

    finding: Extent
    judging: Extent
    v_together: int = 1


def twice(layers: int) -> int:
    """Layers whose K is measured in two types."""
    return math.ceil(layers / 3)


def alone(layers: int) -> int:
    """Caches on the text that finds the types, if the budget allows all."""
    return APART + 2 * layers + twice(layers)


class Progress:
    """Hears of tokens that were evaluated, out of `total`; tells the share, what comes next, the time left.

    `seconds_per_token` is what it starts from; as soon as something is measured, that counts.
    """

    def __init__(self, on_step: OnStep, total: int, done: int, seconds_per_token: float) -> None:
        self._on_step, self._total, self._rate = on_step, total, seconds_per_token
        self._done, self._measured, self._seconds = float(done), 0.0, 0.0

    def __call__(self, what: str, tokens: float = 0, seconds: float | None = None) -> None:
        """`seconds` that the tokens took; None: they were known."""
        self._done += tokens
        if seconds is not None:
            self._measured, self._seconds = self._measured + tokens, self._seconds + seconds
            self._rate = self._seconds / self._measured
        left = max(0.0, self._total - self._done)
        self._on_step(min(1.0, self._done / self._total), what, left * self._rate)


@dataclass(frozen=True)
class Bench:
    """Where profiles of one model are measured: texts to find the types, choose and judge on.

    `start`: window and statistics of every profile; `v_together`: how many
    neighbours' V is measured at once; `weights`: what the model was measured with.
    """

    shape: ModelShape
    start: Profile
    finding: Text
    choosing: Text
    judging: Text
    v_together: int
    weights: str
    progress: Progress

    @property
    def found_on(self) -> str:
        together = f", V of {self.v_together} layers at once" if self.v_together > 1 else ""
        return f"{self.finding.extent} tokens{together}"

    def profile(self, k: tuple[str, ...], v: tuple[str, ...]) -> Profile:
        return replace(self.start, k=k, v=v)


def prepare(
    model: ModelFile,
    corpus: CorpusFile,
    build: Build,
    folder: Path,
    plan: Plan,
    on_step: OnStep,
) -> Bench:
    """Halve the corpus, calibrate, and fit the plan to this machine's speed.

    Raises:
        UsageError: the corpus is one line.
        EnvironmentProblem: a tool failed, or the disk is full.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found_on, judged_on = _halves(corpus, folder)
    on_step(0.0, "weights without rounding of their own", None)
    shape = model_shape(model.path)
    exact = _wants_exact_weights(model, shape, folder)
    weights = "dequantized" if exact else "as published"

    def path() -> Path:
        return _exact_weights(model, build, folder) if exact else model.path

    on_step(0.0, "calibrate K and Q", None)
    statistics, rate = _calibrated(model, path, replace(corpus, path=found_on), build, folder, plan)
    n, at_once = shape.n_layer, _at_once(model)
    fit = plan.fitted(n, rate, at_once)
    total = _CALIBRATION.tokens + plan.work(n, fit, at_once)
    progress = Progress(on_step, total, _CALIBRATION.tokens, _HARDER * rate)
    start = Profile(("f16",) * n, ("f16",) * n, plan.recent, plan.first, statistics=statistics)
    one = Text(build, path, f"{model.sha256} {weights}", shape, found_on, folder, fit.finding, plan.threads)
    one = replace(one, at_once=at_once)
    return Bench(
        shape=shape,
        start=start,
        finding=one,
        choosing=replace(one, extent=fit.judging),
        judging=replace(one, text=judged_on, extent=fit.judging),
        v_together=fit.v_together,
        weights=weights,
        progress=progress,
    )


def _calibrated(
    model: ModelFile,
    path: Callable[[], Path],
    corpus: CorpusFile,
    build: Build,
    folder: Path,
    plan: Plan,
) -> tuple[Mapping[str, NDArray[np.float16]], float]:
    """Statistics of Q and K, and the seconds that a token took."""
    file = folder / f"{model.sha256[:12]}-{corpus.sha256[:12]}.kv-anchor.gguf"
    note = file.with_suffix(".json")
    if not (file.is_file() and note.is_file()):
        exact = replace(model, path=path())
        begin, extent = time.monotonic(), _CALIBRATION
        calibrate(exact, corpus, build, file, ctx=extent.ctx, chunks=extent.chunks, threads=plan.threads)
        seconds = (time.monotonic() - begin) / extent.tokens
        with writing(note):
            note.write_text(json.dumps({"seconds_per_token": seconds}), encoding="utf-8")
    return read_statistics(file), float(json.loads(note.read_text(encoding="utf-8"))["seconds_per_token"])


WEIGHTS = "weights-f16.gguf"
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def _wants_exact_weights(model: ModelFile, shape: ModelShape, folder: Path) -> bool:
    """Are the weights quantized, and is there room for them as 16-bit floats?

    With quantized weights llama.cpp rounds activations to 8 bits. Any other cache rounds them otherwise, and
    that costs more divergence than most layers' K and V do: their costs would be lost in it.
    """
    if all(t.tensor_type in _PLAIN for t in GGUFReader(model.path).tensors):
        return False
    need = 2 * shape.n_params
    return need <= shutil.disk_usage(folder).free / 2 and need <= psutil.virtual_memory().total / 2


def _exact_weights(model: ModelFile, build: Build, folder: Path) -> Path:
    """The model with its weights as 16-bit floats; made where it isn't there."""
    out = folder / WEIGHTS
    if not out.is_file():
        scratch, log = out.with_suffix(".part"), folder / "quantize.log"
        argv = [str(build.tool("llama-quantize")), "--allow-requantize", str(model.path), str(scratch), "F16"]
        outcome = run(argv, log=log, env=child_environment()[0])
        if outcome.returncode != 0 or not scratch.is_file():
            raise EnvironmentProblem(f"llama-quantize failed on {model.name}", f"read {log}")
        scratch.replace(out)
    return out


def _at_once(model: ModelFile) -> int:
    """Contexts that one process may hold: each has logits of 256 tokens, and as much again."""
    each = 3 * 256 * 4 * (model.gguf.n_vocab or 1) + 2**26
    return max(2, min(AT_ONCE, int(0.4 * psutil.virtual_memory().available / each)))


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
