"""What a KV profile makes of a cell: its types, name, bits and exact window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.formats.window import OFF, Window
from turbo_eval.inputs.kv_profile import NO_CACHE, ModelShape, ProfileFile, model_shape, read_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.records.cell import CellProfile
from turbo_eval.util.numbers import TokensOrAuto


@dataclass(frozen=True)
class Cache:
    """How the KV cache of a cell is to be: a pair of types, or a profile, then `k` and `v` are its name and
    its bits."""

    k: str
    v: str
    window: Window = OFF
    profile: ProfileFile | None = None

    def of_cell(self) -> CellProfile | None:
        """What a cell keeps of the profile."""
        p = self.profile
        if p is None:
            return None
        bits_k, bits_v = mean_bits(p.profile.k), mean_bits(p.profile.v)
        return CellProfile(
            sha256=p.sha256, types_k=p.types_k, types_v=p.types_v, bits_k=bits_k, bits_v=bits_v
        )


def mean_bits(types: Sequence[str]) -> float:
    """Bits per value; every layer that has a cache counts alike."""
    bits = [cache_type(t).bpv for t in types if t != NO_CACHE]
    return sum(bits) / len(bits)


def read_profiles(paths: Iterable[str], build: Build) -> list[ProfileFile]:
    """The profiles that are asked for.

    Raises:
        UsageError: the build doesn't read profiles, one cannot be read, or two have one name.
    """
    found: dict[str, ProfileFile] = {}
    for path in paths:
        if not capabilities(build).kv_profile:
            raise UsageError(f"the build in {build.bin_dir} reads no KV profiles", "use the patched build")
        file = read_profile(Path(path))
        other = found.setdefault(file.name, file)
        if other.sha256 != file.sha256:
            raise UsageError(
                f"{other.path} and {path} would both be called {file.name} in tables", "rename one of them"
            )
    return list(found.values())


def fitting_profiles(profiles: Iterable[ProfileFile], model: ModelFile) -> list[ProfileFile]:
    """Those that are for this model; llama.cpp compares the same and refuses the others."""
    shape: ModelShape | None = None
    fitting = []
    for file in profiles:
        shape = shape or model_shape(model.path)
        if file.shape == shape:
            fitting.append(file)
    return fitting


def windowed_profiles(
    asked: Iterable[TokensOrAuto], first: TokensOrAuto, profiles: Iterable[ProfileFile]
) -> list[Cache]:
    """Each profile with the windows that are asked for; "auto" is its own."""
    caches = []
    for file in profiles:
        own = file.profile
        bits = own.bits or (mean_bits(own.k) + mean_bits(own.v)) / 2
        for recent in dict.fromkeys(asked):
            newest = own.recent if recent == "auto" else recent
            begin = (own.first if newest else 0) if first == "auto" else first
            caches.append(Cache(file.name, f"{bits:.2f}", Window(newest, begin), file))
    return caches
