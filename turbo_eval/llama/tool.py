"""llama-perplexity: what this build of it can do, and the command line for a cell."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.formats.window import Window
from turbo_eval.llama.backends import backend
from turbo_eval.llama.build import Build
from turbo_eval.records.cell import Cell
from turbo_eval.util.numbers import TokensOrAuto
from turbo_eval.util.process import child_environment

KV_EVAL = "llama-kv-eval"


@dataclass(frozen=True)
class Capabilities:
    """Cache types that the tool's --help lists; whether it has --kv-anchor, --kv-recent and --kv-profile, and
    whether llama-kv-eval lies beside it."""

    cache_types: frozenset[str]
    kv_anchor: bool
    kv_window: bool
    kv_eval: bool = False
    kv_profile: bool = False


def capabilities(build: Build) -> Capabilities:
    """Ask the build's llama-perplexity.

    Raises:
        EnvironmentProblem: it is missing or doesn't run.
    """
    return _capabilities(build.tool("llama-perplexity"))


@lru_cache
def _capabilities(tool: Path) -> Capabilities:
    env, _ = child_environment()
    try:
        done = subprocess.run(
            [tool, "--help"], capture_output=True, text=True, errors="replace", env=env, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{tool} does not run: {error}", "rebuild it") from None
    text = done.stdout + done.stderr
    types = re.search(r"--cache-type-k\b.*?allowed values:\s*([\w, \n]+?)\n\s*\(", text, re.S)
    if types is None:
        reason = text.strip().splitlines()[-1] if text.strip() else f"exit code {done.returncode}"
        raise EnvironmentProblem(f"{tool} --help names no cache types: {reason}", "rebuild it")
    names = frozenset(t.strip() for t in types[1].split(",") if t.strip())
    able = {option: f"--kv-{option}" in text for option in ("anchor", "recent", "profile")}
    kv_eval = able["anchor"] and able["recent"] and tool.with_name(KV_EVAL).is_file()
    return Capabilities(
        names,
        kv_anchor=able["anchor"],
        kv_window=able["recent"],
        kv_eval=kv_eval,
        kv_profile=able["profile"],
    )


def check_window(recent: Iterable[TokensOrAuto], first: TokensOrAuto, build: Build) -> None:
    """Refuse a window that the build cannot have.

    Raises:
        UsageError: says which, and what to do.
    """
    asked = [size for size in (*recent, first) if size not in ("auto", 0)]
    if asked and not capabilities(build).kv_window:
        raise UsageError(
            f"the build in {build.bin_dir} has no exact window, so {asked[0]} exact tokens cannot be kept",
            "use recent = 0 (--recent 0) or the patched build",
        )


def check_types(build: Build, pairs: tuple[tuple[str, str], ...]) -> None:
    """Refuse cache types that the build does not know, before anything runs.

    Raises:
        UsageError: names the first one and what is known.
    """
    known = capabilities(build).cache_types
    for name in dict.fromkeys(t for pair in pairs for t in pair):
        if name not in known:
            raise UsageError(
                f"the build in {build.bin_dir} does not know the cache type {name}"
                f" (it knows {', '.join(sorted(known))})",
                "leave it out or use the patched build",
            )


# Plain, complete, machine-readable output: level 4 is where the KV cache describes itself.
LOGGING = ("--verbosity", "4", "--log-colors", "off", "--no-log-prefix", "--no-log-timestamps")


def perplexity_argv(
    cell: Cell,
    build: Build,
    *,
    model: Path,
    corpus: Path,
    threads: int,
    anchor: str | Path | None = None,
    profile: Path | None = None,
    logits_out: Path | None = None,
    logits_base: Path | None = None,
) -> list[str]:
    """The llama-perplexity command for a cell.

    Args:
        anchor: value for --kv-anchor; None leaves the flag out.
        profile: value for --kv-profile, in place of the cell's types.
        logits_out: write the run's log-probabilities there.
        logits_base: compare with the log-probabilities there (KL divergence); the text is then
            taken from that file.
    """
    argv = [str(build.tool("llama-perplexity")), *_text(cell, model, corpus, cell.chunks)]
    argv += ["--kv-profile", str(profile)] if profile is not None else ["-ctk", cell.k, "-ctv", cell.v]
    argv += _how(cell, threads)
    if anchor is not None:
        argv += ["--kv-anchor", str(anchor)]
    if capabilities(build).kv_window:
        argv += ["--kv-recent", str(cell.recent), "--kv-first", str(cell.first)]
    if logits_out is not None:
        argv += ["--kl-divergence-base", str(logits_out)]
    if logits_base is not None:
        argv += ["--kl-divergence", "--kl-divergence-base", str(logits_base)]
    return [*argv, *LOGGING]


def kv_eval_argv(
    cell: Cell,
    build: Build,
    *,
    model: Path,
    corpus: Path,
    threads: int,
    reference: str,
    pairs: Sequence[str],
    chunks: int,
    first_chunk: int,
    one_token: int,
    out: Path,
) -> list[str]:
    """The llama-kv-eval command that scores several caches of one comparison.

    Args:
        cell: a batched cell of it: model, text, context and batch are its.
        reference, pairs: as `kv_eval_pair` writes them.
        chunks: to evaluate in batches, from `first_chunk` of the text on; may be 0.
        one_token: chunks to evaluate one token at a time, from the same on.
        out: where the figures of each token go.
    """
    argv = [str(build.tool(KV_EVAL)), *_text(cell, model, corpus, chunks), *_how(cell, threads)]
    argv += ["--first-chunk", str(first_chunk), "--one-token", str(one_token), "--reference", reference]
    for pair in pairs:
        argv += ["--pair", pair]
    return [*argv, "--out", str(out), *LOGGING]


def kv_eval_pair(k: str, v: str, anchor: str, window: Window) -> str:
    """A cache as llama-kv-eval is told of it."""
    return f"{k}:{v},anchor={anchor},recent={window.recent},first={window.first}"


def _text(cell: Cell, model: Path, corpus: Path, chunks: int) -> list[str]:
    sizes = ["-c", str(cell.ctx), "-b", str(cell.batch), "-ub", str(cell.ubatch), "--chunks", str(chunks)]
    return ["-m", str(model), "-f", str(corpus), *sizes]


def _how(cell: Cell, threads: int) -> list[str]:
    # --fit would change unset arguments to what fits the device's memory.
    flags = ["-fa", "on" if cell.flash_attn else "off", "-t", str(threads), "-fit", "off", "--no-warmup"]
    return [*flags, *backend(cell.backend).device_flags()]
