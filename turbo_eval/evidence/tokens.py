"""What is kept of each token beside a record, and the numbers of a record that follow from it. Pure but for
the two functions that read and write the file."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbo_eval.errors import IncompleteError
from turbo_eval.evidence.kv_eval import Figures
from turbo_eval.util.files import writing

_TYPES = {"token": np.uint32, "top": np.uint32, "base_top": np.uint32}
_DIGITS = 9  # of what goes into a record; the figures themselves are of 32 bits


@dataclass(frozen=True)
class Tokens:
    """Figures of a cache and of f16/f16 in the same process; arrays of shape (chunks, scored tokens).

    `token` is the true token; `nll`, `top` its negative log-likelihood in nats and the most probable token;
    `kld` the KL divergence from f16/f16, `dp` the probability of the true token minus that of f16/f16;
    `base_nll`, `base_top` those of f16/f16.
    """

    token: NDArray[np.uint32]
    nll: NDArray[np.float32]
    top: NDArray[np.uint32]
    kld: NDArray[np.float32]
    dp: NDArray[np.float32]
    base_nll: NDArray[np.float32]
    base_top: NDArray[np.uint32]

    @classmethod
    def of(cls, own: Figures, base: Figures) -> Tokens:
        """From what llama-kv-eval wrote of a cache and of the reference."""
        return cls(own.token, own.nll, own.top, own.kld, own.dp, base.nll, base.top)

    @property
    def chunks(self) -> int:
        return int(self.nll.shape[0])

    def first(self, chunks: int) -> Tokens:
        """Of the first chunks alone."""
        return Tokens(**{field.name: getattr(self, field.name)[:chunks] for field in fields(self)})

    def then(self, more: Tokens) -> Tokens:
        """With the chunks that follow."""
        names = [field.name for field in fields(self)]
        return Tokens(**{name: np.concatenate([getattr(self, name), getattr(more, name)]) for name in names})

    def reference(self) -> Tokens:
        """Those of the reference alone, as figures of its own."""
        zero = np.zeros_like(self.kld)
        return Tokens(self.token, self.base_nll, self.base_top, zero, zero, self.base_nll, self.base_top)


def save(tokens: Tokens, path: Path) -> str:
    """Write them; returns the file's sha256. The same figures give the same bytes.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    stream = io.BytesIO()
    np.savez_compressed(stream, **{field.name: getattr(tokens, field.name) for field in fields(tokens)})
    content = stream.getvalue()
    scratch = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    return hashlib.sha256(content).hexdigest()


def load(path: Path, sha256: str) -> Tokens:
    """Read them.

    Raises:
        IncompleteError: the file is not there, is not the one that the record speaks of, or is damaged.
    """
    step = "run the sweep again with --fresh"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IncompleteError(
            f"the figures of each token in {path} cannot be read: {error.strerror}", step
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise IncompleteError(f"{path} is not the file that its record speaks of", step)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        values = {f.name: arrays[f.name].astype(_TYPES.get(f.name, np.float32)) for f in fields(Tokens)}
    return Tokens(**values)


def numbers(tokens: Tokens) -> dict[str, Any]:
    """`ppl`, `ppl_err`, `running_ppl`, `kld` and `by_chunk` of a record.

    `ppl_err` is over tokens, as llama-perplexity has it: how far the text itself may be from others. The
    errors of what compares two caches are over chunks, because the tokens of a chunk hang together; with one
    chunk there is none.
    """
    nll, base = tokens.nll.astype(np.float64), tokens.base_nll.astype(np.float64)
    own, reference = nll.mean(axis=1), base.mean(axis=1)
    ppl, ppl_err = _perplexity(nll)
    return {
        "ppl": ppl,
        "ppl_err": ppl_err,
        "running_ppl": [round(float(x), _DIGITS) for x in np.exp(_running(own))],
        "kld": _kld(tokens, own - reference, _perplexity(base)),
        "by_chunk": {
            "nll": _list(own),
            "base_nll": _list(reference),
            "kld": _list(tokens.kld.astype(np.float64).mean(axis=1)),
            "same_top": _list((tokens.top == tokens.base_top).mean(axis=1)),
            "lost": int(((tokens.base_top == tokens.token) & (tokens.top != tokens.token)).sum()),
            "won": int(((tokens.base_top != tokens.token) & (tokens.top == tokens.token)).sum()),
            "scored": int(tokens.token.size),
        },
    }


def _running(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first chunk, the first two, …"""
    found: NDArray[np.float64] = np.cumsum(means) / np.arange(1, len(means) + 1)
    return found


def _perplexity(nll: NDArray[np.float64]) -> tuple[float, float]:
    """With its standard error over tokens."""
    ppl = float(np.exp(nll.mean()))
    return round(ppl, _DIGITS), round(ppl * float(nll.std()) / float(np.sqrt(max(nll.size - 1, 1))), _DIGITS)


def _list(values: NDArray[np.floating[Any]]) -> list[float]:
    return [round(float(x), _DIGITS) for x in values]


def _error(per_chunk: NDArray[np.floating[Any]]) -> float | None:
    """Standard error of the mean over chunks; None with one."""
    if len(per_chunk) < 2:
        return None
    return round(float(per_chunk.std(ddof=1)) / float(np.sqrt(len(per_chunk))), _DIGITS)


def _kld(tokens: Tokens, ratio: NDArray[np.float64], base: tuple[float, float]) -> dict[str, float | None]:
    kld, dp = tokens.kld.astype(np.float64), tokens.dp.astype(np.float64)
    same = tokens.top == tokens.base_top
    ln_ratio, ln_err = float(ratio.mean()), _error(ratio)
    rms = float(np.sqrt((dp**2).mean()))
    square_err = _error((dp**2).mean(axis=1))
    found = {
        "mean": float(kld.mean()),
        "median": float(np.median(kld)),
        **{name: float(np.quantile(kld, q)) for name, q in (("p90", 0.9), ("p99", 0.99), ("p999", 0.999))},
        "max": float(kld.max()),
        "ppl_base": base[0],
        "ppl_base_err": base[1],
        "ln_ratio": ln_ratio,
        "ratio": float(np.exp(ln_ratio)),
        "rms_dp_pct": 100 * rms,
        "same_top_pct": 100 * float(same.mean()),
    }
    same_err = _error(same.mean(axis=1))
    errors = {
        "mean_err": _error(kld.mean(axis=1)),
        "ln_ratio_err": ln_err,
        "ratio_err": None if ln_err is None else float(np.exp(ln_ratio)) * ln_err,
        "rms_dp_pct_err": 0.0 if rms == 0 else None if square_err is None else 100 * 0.5 / rms * square_err,
        "same_top_pct_err": None if same_err is None else 100 * same_err,
    }
    return {name: None if x is None else round(x, _DIGITS) for name, x in (found | errors).items()}
