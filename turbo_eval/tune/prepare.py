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
from turbo_eval.tune.measure import Extent, Text
from turbo_eval.util.files import writing
from turbo_eval.util.process import child_environment, run

APART = 4  # caches beside each layer's K and V: exact, and three of all layers
JUDGED, BETWEEN = 5, 5  # caches that are judged, and that are chosen from
# Parts of the context to find the types on, from the most to the least: what lies behind the window costs
# more in a long context, so a shorter one is a last resort.
_FINDING = (1, 2, 4)
_CALIBRATION = Extent(512, 8)


OnStep = Callable[[float, str], None]  # share of the work that is done, what comes next


@dataclass(frozen=True)
class Plan:
    """`judging`: on how much text profiles are compared; `budget`: seconds for all, None: no limit.

    `recent` and `first` are the exact window's tokens.
    """

    judging: Extent
    budget: float | None = None
    recent: int = 128
    first: int = 4
    threads: int | None = None

    def tokens(self, layers: int) -> int:
        """That all contexts together evaluate, if the budget allows all."""
        return _CALIBRATION.tokens + work(layers, replace(self.judging, chunks=1), self.judging)

    def fitted(self, layers: int, seconds_per_token: float, spent: float) -> tuple[Extent, Extent]:
        """What to find the types on and what to judge them on, within the budget if it can be."""
        judged = [self.judging, replace(self.judging, chunks=1), Extent(min(self.judging.ctx, 1024), 1)]
        least = Extent(2 * (self.recent + self.first), 1)
        shares = [Extent(self.judging.ctx // share, 1) for share in _FINDING]
        finding = [max(e, least, key=lambda x: x.ctx) for e in shares]
        finding = [e if e.ctx <= self.judging.ctx else replace(e, ctx=self.judging.ctx) for e in finding]
        for find in finding:
            for judging in judged:
                cost = seconds_per_token * work(layers, find, judging)
                if self.budget is None or spent + cost <= self.budget:
                    return find, judging
        return finding[-1], judged[-1]


def twice(layers: int) -> int:
    """Layers whose K is measured in two types."""
    return math.ceil(layers / 3)


def alone(layers: int) -> int:
    """Caches on the text that finds the types."""
    return APART + 2 * layers + twice(layers)


def work(layers: int, finding: Extent, judging: Extent) -> int:
    """Tokens that all contexts together evaluate, the exact ones among them."""
    caches = alone(layers)
    return finding.tokens * (caches + caches // 12 + 2) + judging.tokens * (BETWEEN + 1 + JUDGED + 2)


class Progress:
    """Hears of tokens that were evaluated, out of `total`, and tells the share and what comes next."""

    def __init__(self, on_step: OnStep, total: int, done: int) -> None:
        self._on_step, self._total, self._done = on_step, total, done

    def __call__(self, tokens: int, what: str) -> None:
        self._done += tokens
        self._on_step(min(1.0, self._done / self._total), what)


@dataclass(frozen=True)
class Bench:
    """Where profiles of one model are measured: texts to find the types, choose and judge on.

    `start`: window and statistics of every profile; `weights`: what the model was measured with.
    """

    shape: ModelShape
    start: Profile
    finding: Text
    choosing: Text
    judging: Text
    weights: str
    progress: Progress

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
    begin = time.monotonic()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found_on, judged_on = _halves(corpus, folder)
    on_step(0.0, "weights without rounding of their own")
    shape = model_shape(model.path)
    exact = _wants_exact_weights(model, shape, folder)
    weights = "dequantized" if exact else "as published"

    def path() -> Path:
        return _exact_weights(model, build, folder) if exact else model.path

    on_step(0.0, "calibrate K and Q")
    statistics, rate = _calibrated(model, path, replace(corpus, path=found_on), build, folder, plan)
    n = shape.n_layer
    finding, judging = plan.fitted(n, rate, time.monotonic() - begin)
    total = _CALIBRATION.tokens + work(n, finding, judging)
    progress = Progress(on_step, total, _CALIBRATION.tokens)
    start = Profile(("f16",) * n, ("f16",) * n, plan.recent, plan.first, statistics=statistics)
    one = Text(build, path, f"{model.sha256} {weights}", shape, found_on, folder, finding, plan.threads)
    one = replace(one, at_once=_at_once(model))
    return Bench(
        shape=shape,
        start=start,
        finding=one,
        choosing=replace(one, extent=judging),
        judging=replace(one, text=judged_on, extent=judging),
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
    return max(2, min(16, int(0.4 * psutil.virtual_memory().available / each)))


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
