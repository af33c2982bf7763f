"""The cache types llama.cpp takes for K and V: names, blocks, bits per value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from turbo_eval.errors import UsageError
from turbo_eval.util import paths
from turbo_eval.util.text import nearest

Place = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Codebook:
    """The constants of one of our types, as in ggml-common.h and ggml-turbo-impl.h.

    Attributes:
        name: ggml's type name.
        magnitudes: ascending positive int8 levels; the codebook is symmetric.
        rms1: rms of a Gaussian group whose best scale is 1 on average.
        bits: bits per value, scale included.
        mse_limit: what docs/explanation/cache-types.md promises for unit Gaussians, squared error per unit of
            variance.
        gate_kld, gate_kld_v: KL divergence, in nats, that a project's first gate allows the type on K and V
            (None: its gate leaves the type out), and on V alone beside a q8_0 K; None: no such check.
        place: (value in the block, bit of its code) → (byte of the block, bit of that byte).
    """

    name: str
    magnitudes: tuple[int, ...]
    rms1: float
    bits: float
    mse_limit: float
    gate_kld: float | None
    gate_kld_v: float | None
    place: Place


@dataclass(frozen=True)
class CacheType:
    """One type. `block` in values, `block_bytes` in bytes, as in ggml-common.h.

    Attributes:
        mse: squared error per unit of variance on Gaussians: docs/explanation/cache-types.md for ours, for
            the others measured with their reference encoders on 2^17 values; None: not measured.
        codebook: of the types that our patches add.
        common: among the pairs that commands take when none are named.
        beside_ours: on K where one of our types is on V alone.
    """

    name: str
    block: int
    block_bytes: int
    mse: float | None = None
    codebook: Codebook | None = None
    common: bool = False
    beside_ours: bool = False

    @property
    def bpv(self) -> float:
        """Bits per value, scales included."""
        return 8.0 * self.block_bytes / self.block


def _turbo2_place(i: int, bit: int) -> tuple[int, int]:
    """Magnitude and sign lie together, four values to a byte."""
    group, i = divmod(i, 32)
    return 2 + 8 * group + i % 8, 2 * (i // 8) + bit


def _turbo3_place(i: int, bit: int) -> tuple[int, int]:
    """Two bits of a code lie together, the third, its sign, in a plane of its own."""
    group, i = divmod(i, 32)
    b, k = i % 8, i // 8
    if bit < 2:
        return 2 + 8 * group + b, 2 * k + bit
    return 18 + 4 * group + b % 4, 4 * (k // 2) + 2 * (b // 4) + k % 2


def _turbo4_place(i: int, bit: int) -> tuple[int, int]:
    """Values 16 apart share a byte, as in q4_0."""
    group, i = divmod(i, 32)
    return 2 + 16 * group + i % 16, 4 * (i // 16) + bit


_TURBO2 = Codebook("turbo2", (35, 122), 70.0, 2.25, 0.106, None, None, _turbo2_place)
_TURBO3 = Codebook("turbo3", (13, 41, 74, 123), 52.82, 3.25, 0.0265, 0.25, 0.05, _turbo3_place)
_TURBO4 = Codebook(
    "turbo4", (6, 18, 31, 45, 60, 77, 98, 127), 47.46, 4.25, 0.0061, 0.055, None, _turbo4_place
)

# A type is added here, in one row; everything else that needs it reads it from here.
CACHE_TYPES: dict[str, CacheType] = {
    t.name: t
    for t in (
        CacheType("f32", 1, 4),
        CacheType("f16", 1, 2, mse=4.2e-8, common=True),
        CacheType("bf16", 1, 2, mse=2.7e-6),
        CacheType("q8_0", 32, 34, mse=2.1e-5, common=True, beside_ours=True),
        CacheType("q5_1", 32, 24, mse=1.5e-3),
        CacheType("q5_0", 32, 22, mse=1.8e-3),
        CacheType("q4_1", 32, 20, mse=6.3e-3),
        CacheType("q4_0", 32, 18, mse=7.4e-3, common=True),
        CacheType("iq4_nl", 32, 18, mse=5.6e-3),
        CacheType("turbo4", 64, 34, mse=5.9e-3, codebook=_TURBO4, common=True),
        CacheType("turbo3", 64, 26, mse=2.55e-2, codebook=_TURBO3, common=True),
        CacheType("turbo2", 64, 18, mse=0.105, codebook=_TURBO2),
    )
}


def usual_pairs() -> tuple[tuple[str, str], ...]:
    """The pairs that are worth asking for, from few bits to many. A cheap K costs more quality than a cheap
    V, so K is never the smaller one."""
    common = sorted((t for t in CACHE_TYPES.values() if t.common), key=lambda t: t.bpv)
    pairs = []
    for k in common:
        if k.codebook or k.beside_ours:
            pairs += [(k.name, v.name) for v in common if v.codebook and v.bpv < k.bpv]
        pairs.append((k.name, k.name))
    return tuple(pairs)


BOOKS: dict[str, Codebook] = {t.name: t.codebook for t in CACHE_TYPES.values() if t.codebook}


def cache_type(name: str) -> CacheType:
    """Look a type up.

    Raises:
        UsageError: no such type; names the nearest one.
    """
    if name in CACHE_TYPES:
        return CACHE_TYPES[name]
    own = _LEARNT | _of_project()
    if name in own:
        return own[name]
    raise UsageError(f"unknown cache type {name!r}", _did_you_mean(name, [*CACHE_TYPES, *own]))


def known_types() -> list[str]:
    """The names of all types, the project's own among them."""
    return [*CACHE_TYPES, *_of_project()]


# Of records that were read: types of somebody else's sources.
_LEARNT: dict[str, CacheType] = {}


def learn(name: str, block: int, block_bytes: int) -> None:
    """Take note of a type that a record describes; what is known already stays."""
    _LEARNT.setdefault(name, CacheType(name, block, block_bytes))


def _of_project() -> dict[str, CacheType]:
    """What the sources of the project that we are in have beside ours."""
    project = paths.project()
    types = project.settings.types if project is not None else {}
    return {name: CacheType(name, size.block, size.block_bytes) for name, size in types.items()}


def _did_you_mean(name: str, types: list[str]) -> str:
    near = nearest(name.lower(), types, cutoff=0.4)
    known = ", ".join(types)
    return f"perhaps you meant {near!r} (known: {known})" if near else f"known are {known}"


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


def stored_dims(dim_k: int, dim_v: int, k: str, v: str) -> tuple[int, int]:
    """Head dimensions of K and V in the cache, in values.

    Where a type of the pair has blocks of 64 that do not divide a head, heads are filled up with zeros to a
    multiple of 64 (llama_kv_cache::head_multiple() of the series).
    """
    if 64 in (cache_type(k).block, cache_type(v).block):
        return -(-dim_k // 64) * 64, -(-dim_v // 64) * 64
    return dim_k, dim_v


def undivided(dim_k: int, dim_v: int, k: str, v: str) -> str:
    """The sides of a pair, of "KV", whose blocks do not divide the heads as the cache stores them."""
    stored = stored_dims(dim_k, dim_v, k, v)
    return "".join(
        side for side, name, dim in zip("KV", (k, v), stored, strict=True) if dim % cache_type(name).block
    )


def kv_mib(k: str, v: str, *, n_layer: int, n_head_kv: int, dim_k: int, dim_v: int, ctx: int) -> float:
    """KV cache size in MiB of a plain attention model: every layer caches every position.

    `dim_k` and `dim_v` are head dimensions in values, `ctx` in tokens.
    """
    dim_k, dim_v = stored_dims(dim_k, dim_v, k, v)
    bits = n_layer * n_head_kv * ctx * (dim_k * cache_type(k).bpv + dim_v * cache_type(v).bpv)
    return bits / 8 / 2**20
