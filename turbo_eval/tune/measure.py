"""KL divergence of many caches on one text, by llama-kv-eval; what was measured is kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.evidence.kv_eval import KvEval, read_kv_eval
from turbo_eval.inputs.kv_profile import ModelShape, Profile, write_profile
from turbo_eval.llama.backends import backend
from turbo_eval.llama.build import Build
from turbo_eval.llama.output import last_error
from turbo_eval.util.files import writing
from turbo_eval.util.process import child_environment, run

TOOL = "llama-kv-eval"
Cache = Profile | str  # a string: a pair as llama-kv-eval takes it, "q8_0:q8_0,recent=0,first=0"


@dataclass(frozen=True)
class Extent:
    """`chunks` of `ctx` tokens, the second half of each scored."""

    ctx: int
    chunks: int

    @property
    def tokens(self) -> int:
        return self.ctx * self.chunks

    def __str__(self) -> str:
        return f"{self.chunks} x {self.ctx}"


def evaluated(caches: int, extent: Extent, at_once: int) -> int:
    """Tokens that all contexts together evaluate, the exact one of each process among them."""
    return extent.tokens * (caches + math.ceil(caches / at_once))


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence from f16/f16 in nats and change of perplexity in percent, with standard errors.

    `mib`: the cache at the text's context, window counted.
    """

    mean: float
    error: float
    delta_pct: float
    delta_err_pct: float
    mib: float


@dataclass(frozen=True)
class Text:
    """One text and one model. `folder` keeps what was measured: a second run goes on from there.

    `model` makes the file where it isn't there. `at_once` caches are measured by one process beside the exact
    one, which is computed once for all.
    """

    build: Build
    model: Callable[[], Path]
    model_sha256: str
    shape: ModelShape
    text: Path
    folder: Path
    extent: Extent
    threads: int | None
    at_once: int = 12

    def measure(
        self, caches: Sequence[Cache], on_cache: Callable[[int, float | None], None]
    ) -> list[Divergence]:
        """The divergence of each.

        Args:
            on_cache: hears how many became known, and the seconds they took; None: they were known before.

        Raises:
            EnvironmentProblem: llama-kv-eval failed, refused a cache, or a figure isn't finite.
        """
        keys = [_key(cache) for cache in caches]
        known = self._known()
        wanted = {k: c for k, c in zip(keys, caches, strict=True) if k not in known}
        if len(wanted) < len(keys):
            on_cache(len(keys) - len(wanted), None)
        todo = list(wanted.items())
        size = max(1, min(self.at_once, math.ceil(len(todo) / max(1, math.ceil(len(todo) / self.at_once)))))
        for start in range(0, len(todo), size):
            part = dict(todo[start : start + size])
            begin = time.monotonic()
            known |= self._run(part)
            with writing(self._file):
                scratch = self._file.with_suffix(".part")
                scratch.write_text(json.dumps(known, indent=1), encoding="utf-8")
                scratch.replace(self._file)
            on_cache(len(part), time.monotonic() - begin)
        return [Divergence(*known[key]) for key in keys]

    @property
    def _file(self) -> Path:
        parts = self.model_sha256, hashlib.sha256(self.text.read_bytes()).hexdigest(), self.build.tree
        identity = f"{' '.join(parts)} {self.build.backend} {self.extent.ctx} {self.extent.chunks}"
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"

    def _known(self) -> dict[str, list[float]]:
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _run(self, caches: Mapping[str, Cache]) -> dict[str, list[float]]:
        out, log = self.folder / "kv-eval.bin", self.folder / "kv-eval.log"
        model = self.model()
        argv = [str(self.build.tool(TOOL)), "-m", str(model), "-f", str(self.text)]
        argv += ["-c", str(self.extent.ctx), "-b", str(self.extent.ctx), "-ub", "256"]
        argv += ["--chunks", str(self.extent.chunks), "-fa", "on", "--no-warmup", "-fit", "off"]
        argv += backend(self.build.backend).device_flags()
        argv += ["-t", str(self.threads)] if self.threads else []
        for number, cache in enumerate(caches.values()):
            pair = cache
            if isinstance(cache, Profile):
                file = self.folder / f"cell-{number}.gguf"
                write_profile(cache, self.shape, file)
                pair = f"f16:f16,profile={file}"
            argv += ["--pair", str(pair)]
        outcome = run([*argv, "--out", str(out)], log=log, env=child_environment()[0])
        if outcome.returncode != 0:
            reason = last_error(outcome.text) or outcome.text.strip().rpartition("\n")[2] or "no reason given"
            raise EnvironmentProblem(f"{TOOL} failed on {model.name}: {reason}", f"read {log}")
        found = read_kv_eval(out)
        out.unlink()
        return {key: _figures(found, number) for number, key in enumerate(caches, start=1)}


def _figures(found: KvEval, number: int) -> list[float]:
    """As `Divergence`. Errors are over tokens; of several chunks over their means where that is more."""
    own, exact = found.figures(number), found.figures(0)
    kld, error = _mean(own.kld)
    change, change_error = _mean(own.nll.astype(np.float64) - exact.nll)
    mib = found.runs[number].context_bytes / found.header.n_seq / 2**20
    figures = [kld, error, 100 * math.expm1(change), 100 * change_error, mib]
    if not all(map(math.isfinite, figures)):
        raise EnvironmentProblem(f"{found.runs[number].spec} has a figure that isn't finite")
    return figures


def _mean(values: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> tuple[float, float]:
    values = values.astype(np.float64)
    error = float(values.std(ddof=1) / math.sqrt(values.size))
    if len(values) > 1:
        error = max(error, float(values.mean(axis=1).std(ddof=1) / math.sqrt(len(values))))
    return float(values.mean()), error


def _key(cache: Cache) -> str:
    """What is measured, without where it comes from."""
    if isinstance(cache, str):
        return cache
    statistics = hashlib.sha256()
    for name, values in sorted(cache.statistics.items()):
        statistics.update(name.encode() + values.tobytes())
    window = f"{cache.recent}+{cache.first} {cache.recent_type}"
    return f"{' '.join(cache.k)} / {' '.join(cache.v)} / {window} / {statistics.hexdigest()[:16]}"
