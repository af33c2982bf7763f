"""KL divergence of a cache on a text, by llama-perplexity; measured values are kept beside the profile."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama.build import Build
from turbo_eval.util.files import writing
from turbo_eval.util.process import child_environment, run

_MEAN = re.compile(r"^Mean +KLD: +(-?[\d.]+|-?nan|-?inf) +± +([\d.]+)", re.M)


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence from f16/f16 and its standard error, nats."""

    mean: float
    error: float


class Text:
    """One text, `chunks` of `ctx` tokens, and the exact log-probabilities that caches are compared with.

    Args:
        folder: for those, logs and what was measured; a second run with the same folder goes on from there.
    """

    def __init__(
        self,
        build: Build,
        model: Path,
        model_sha256: str,
        text: Path,
        folder: Path,
        *,
        ctx: int,
        chunks: int,
        threads: int | None,
    ) -> None:
        self._build, self._model, self._folder = build, model, folder
        self._common = ["-m", str(model), "-f", str(text), "-c", str(ctx), "--chunks", str(chunks)]
        self._common += ["-fa", "on", "--no-warmup", "-fit", "off"]
        self._common += ["--device", "none"] if build.backend == "cpu" else ["-ngl", "999"]
        if threads:
            self._common += ["-t", str(threads)]
        content = hashlib.sha256(text.read_bytes()).hexdigest()
        self._identity = f"{model_sha256} {content} {build.tree} {build.backend} {ctx} {chunks}"
        name = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        self._base = folder / f"{name}.logits"
        self._known = folder / f"{name}.json"
        self._values: dict[str, list[float]] = {}
        if self._known.is_file():
            self._values = json.loads(self._known.read_text())

    def measure(self, arguments: Sequence[str], content: bytes = b"") -> Divergence:
        """Divergence with these arguments; `content`: of the files they name, part of what is remembered.

        Raises:
            EnvironmentProblem: llama-perplexity failed, or its figure isn't a number.
        """
        key = self._key(tuple(arguments), content)
        if key not in self._values:
            if not self._base.is_file():
                part = self._base.with_suffix(".part")
                self._perplexity(["--kl-divergence-base", str(part), "--kv-anchor", "off"], "Final estimate")
                part.replace(self._base)
            said = self._perplexity(
                ["--kl-divergence", "--kl-divergence-base", str(self._base), *arguments], "Mean"
            )
            found = _MEAN.search(said)
            if not found or not re.fullmatch(r"-?[\d.]+", found[1]):
                raise EnvironmentProblem(
                    f"llama-perplexity gave no KL divergence with {' '.join(arguments)}", f"read {self._log}"
                )
            self._values[key] = [float(found[1]), float(found[2])]
            with writing(self._known):
                part = self._known.with_suffix(".part")
                part.write_text(json.dumps(self._values, indent=1))
                part.replace(self._known)
        return Divergence(*self._values[key])

    @property
    def _log(self) -> Path:
        return self._folder / "llama-perplexity.log"

    @staticmethod
    def _key(arguments: Sequence[str], content: bytes) -> str:
        kept = [a for a in arguments if not a.endswith(".gguf")]
        return f"{' '.join(kept)} {hashlib.sha256(content).hexdigest()[:16]}"

    def _perplexity(self, arguments: Sequence[str], wanted: str) -> str:
        argv = [str(self._build.tool("llama-perplexity")), *self._common, *arguments]
        outcome = run(argv, log=self._log, env=child_environment()[0])
        if outcome.returncode != 0 or wanted not in outcome.text:
            lines = [line for line in outcome.text.splitlines() if line.strip()]
            raise EnvironmentProblem(
                f"llama-perplexity failed on {self._model.name}: {lines[-1] if lines else 'it said nothing'}",
                f"read {self._log}",
            )
        return outcome.text
