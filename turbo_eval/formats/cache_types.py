"""The cache types llama.cpp takes for K and V: names, blocks, bits per value."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from turbo_eval.errors import UsageError
from turbo_eval.util import paths


@dataclass(frozen=True)
class CacheType:
    """One type. `block` in values, `block_bytes` in bytes, as in ggml-common.h."""

    name: str
    block: int
    block_bytes: int

    @property
    def bpv(self) -> float:
        """Bits per value, scales included."""
        return 8.0 * self.block_bytes / self.block


CACHE_TYPES: dict[str, CacheType] = {
    t.name: t
    for t in (
        CacheType("f32", 1, 4),
        CacheType("f16", 1, 2),
        CacheType("bf16", 1, 2),
        CacheType("q8_0", 32, 34),
        CacheType("q5_1", 32, 24),
        CacheType("q5_0", 32, 22),
        CacheType("q4_1", 32, 20),
        CacheType("q4_0", 32, 18),
        CacheType("iq4_nl", 32, 18),
        CacheType("turbo4", 64, 34),
        CacheType("turbo3", 64, 26),
    )
}


def cache_type(name: str) -> CacheType:
    """Look a type up.

    Raises:
        UsageError: no such type; names the nearest one.
    """
    if name in CACHE_TYPES:
        return CACHE_TYPES[name]
    own = _of_project()
    if name in own:
        return own[name]
    raise UsageError(f"unknown cache type {name!r}", _did_you_mean(name, [*CACHE_TYPES, *own]))


def _of_project() -> dict[str, CacheType]:
    """What the sources of the project that we are in have beside ours."""
    project = paths.project()
    types = project.settings.types if project is not None else {}
    return {name: CacheType(name, size.block, size.block_bytes) for name, size in types.items()}


def _did_you_mean(name: str, types: list[str]) -> str:
    near = get_close_matches(name.lower(), types, n=1, cutoff=0.4)
    known = ", ".join(types)
    return f"perhaps you meant {near[0]!r} (known: {known})" if near else f"known are {known}"


def parse_pair(text: str) -> tuple[str, str]:
    """Read "K:V" (or "K/V"; one name alone means both sides).

    Raises:
        UsageError: not of that form, or an unknown type.
    """
    parts = [p.strip() for p in text.replace("/", ":").split(":")]
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or not all(parts):
        raise UsageError(f"{text!r} is no K:V pair", "write it like q8_0:turbo3")
    return cache_type(parts[0]).name, cache_type(parts[1]).name


def kv_mib(k: str, v: str, *, n_layer: int, n_head_kv: int, dim_k: int, dim_v: int, ctx: int) -> float:
    """KV cache size in MiB of a plain attention model: every layer caches every position.

    `dim_k` and `dim_v` are head dimensions in values, `ctx` in tokens.
    """
    bits = n_layer * n_head_kv * ctx * (dim_k * cache_type(k).bpv + dim_v * cache_type(v).bpv)
    return bits / 8 / 2**20
