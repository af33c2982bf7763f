"""The llama-server command line that holds what a table promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.formats.window import Window, resolve
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.util.numbers import AUTO

TOOL = "llama-server"
EXACT_K = ("f16", "f32", "bf16")


@dataclass(frozen=True)
class Cache:
    """What the server keeps keys and values in: a pair of types, or a profile's file.

    `anchor` as --kv-anchor takes it; `window` None: as llama.cpp sets it by itself.
    """

    k: str = ""
    v: str = ""
    profile: Path | None = None
    anchor: str = AUTO
    window: Window | None = None

    @property
    def name(self) -> str:
        """ "K/V", or the profile's file."""
        return f"{self.k}/{self.v}" if self.profile is None else self.profile.name


def server_argv(
    build: Build, model: Path, cache: Cache, *, ctx: int | None = None, extra: Sequence[str] = ()
) -> list[str]:
    """The command; options that say what llama.cpp does anyway are left out.

    Args:
        ctx: tokens over all slots; None: as the server chooses.
        extra: llama-server's own options, behind ours.
    """
    server = build.bin_dir / TOOL
    argv = [str(server) if server.is_file() else TOOL, "-m", str(model)]
    argv += ["-c", str(ctx)] if ctx is not None else []
    argv += ["-fa", "on", *_cache_flags(build, cache)]
    if build.backend != "cpu":
        argv += ["-ngl", "999"]
    return [*argv, *extra]


def _cache_flags(build: Build, cache: Cache) -> list[str]:
    if cache.profile is not None:
        flags = ["--kv-profile", str(cache.profile)]
    else:
        flags = ["-ctk", cache.k, "-ctv", cache.v]
    able = capabilities(build)
    if able.kv_anchor and cache.k not in EXACT_K and cache.anchor not in (AUTO, ""):
        flags += ["--kv-anchor", cache.anchor]
    own = resolve(AUTO, AUTO, cache.k, cache.v) if cache.profile is None else None
    if able.kv_window and cache.window is not None and cache.window != own:
        flags += ["--kv-recent", str(cache.window.recent), "--kv-first", str(cache.window.first)]
    return flags
