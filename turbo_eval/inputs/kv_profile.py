"""The file that `--kv-profile` reads: one GGUF that makes a quantized cache good for one model.

Types of K and V for each layer, the exact window, and the statistics of a calibration file, with
where all that comes from. llama.cpp checks every value (src/llama-kv-profile.cpp of the patches).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from turbo_eval.errors import UsageError
from turbo_eval.util.files import writing

VERSION = 1
STATISTICS = ("k_mean", "k_std", "q_rms")
NO_CACHE = "none"


@dataclass(frozen=True)
class ModelShape:
    """What ties a profile to its model.

    Attributes:
        arch: general.architecture.
        n_params: elements of all tensors.
        fingerprint: FNV-1a (64 bits) of the bytes of output_norm.weight: the same for every
            quantization of a model, another one for another fine-tune. 0: the model has none.
        n_layer: transformer blocks.
    """

    arch: str
    n_params: int
    fingerprint: int
    n_layer: int


@dataclass(frozen=True)
class Profile:
    """`k` and `v` hold ggml type names by layer; `recent` and `first` are tokens.

    Attributes:
        statistics: tensors blk.N.{k_mean,k_std,q_rms} of a calibration file, half precision
            [n_head_kv, n_embd_head_k] in numpy's order; empty: llama.cpp estimates them from the weights.
        bits: bits per value, the window not counted.
        predicted: estimated mean KL divergence in nats, `held_out`: measured on text that was not
            used to find the types.
        provenance: strings that go into the file as kv_profile.KEY.
    """

    k: Sequence[str]
    v: Sequence[str]
    recent: int
    first: int
    recent_type: str = "q8_0"
    statistics: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)
    bits: float | None = None
    predicted: float | None = None
    held_out: float | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileFile:
    """A profile on disk. `name` for people: the file's, without its endings; `shape`: of the model it is for.

    `types_k` and `types_v` are the types by layer as llama.cpp prints them.
    """

    path: Path
    name: str
    sha256: str
    shape: ModelShape
    profile: Profile
    types_k: str
    types_v: str


def fnv1a(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h


def model_shape(path: Path) -> ModelShape:
    """Read what ties a profile to the model in this GGUF file.

    Raises:
        UsageError: one part of a split model.
    """
    reader = GGUFReader(path)
    said = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("tokenizer.")}
    if int(said.get("split.count", 1)) > 1:
        raise UsageError(f"{path.name} is one part of a split model", "join it with llama-gguf-split --merge")
    arch = str(said["general.architecture"])
    norm = next((t for t in reader.tensors if t.name == "output_norm.weight"), None)
    return ModelShape(
        arch,
        sum(int(t.n_elements) for t in reader.tensors),
        fnv1a(norm.data.tobytes()) if norm is not None else 0,
        int(said[f"{arch}.block_count"]),
    )


def read_statistics(path: Path) -> dict[str, NDArray[np.float16]]:
    """The tensors of a calibration file (see calibrate.py)."""
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


def types_text(types: Sequence[str]) -> str:
    """As llama.cpp prints types by layer: "turbo4:0,3-5 turbo3:1-2", or the one type that all have."""
    order = [t for t in dict.fromkeys(types) if t != NO_CACHE]
    if len(order) == 1:
        return order[0]
    parts = []
    for name in order:
        runs: list[list[int]] = []
        for layer in (i for i, t in enumerate(types) if t == name):
            if runs and runs[-1][1] == layer - 1:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
        parts.append(f"{name}:" + ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs))
    return " ".join(parts)


SUFFIX = ".kv-profile.gguf"
_SEE, _AGAIN = "see `turbo-eval tune`", "make it again with `turbo-eval tune`"


def read_profile(path: Path) -> ProfileFile:
    """Read what the harness needs to know; llama.cpp checks the rest when it loads the file.

    Raises:
        UsageError: not there, no profile, of another version, or without a type for every layer.
    """
    try:
        data = path.read_bytes()
        reader = GGUFReader(path)
        said = {key: f.contents() for key, f in reader.fields.items()}
    except OSError as error:
        raise UsageError(f"{path} is no KV profile: it cannot be read ({error.strerror})", _SEE) from None
    except (ValueError, IndexError, KeyError, TypeError):
        raise UsageError(f"{path} is no GGUF file", _SEE) from None
    if said.get("general.type") != "kv_profile":
        raise UsageError(f"{path} is no KV profile: it has no types", _SEE)
    version = said.get("kv_profile.version")
    if version != VERSION:
        raise UsageError(
            f"{path} is a KV profile of version {version}, this turbo-eval reads {VERSION}",
            _AGAIN,
        )
    try:
        shape = ModelShape(
            str(said["kv_profile.model.architecture"]),
            int(said["kv_profile.model.n_params"]),
            int(said["kv_profile.model.fingerprint"]),
            len(said["kv_profile.type_k"]),
        )
        prefix = "kv_profile."
        fixed = {"model.architecture", "type_recent"}
        profile = Profile(
            k=tuple(said["kv_profile.type_k"]),
            v=tuple(said["kv_profile.type_v"]),
            recent=int(said["kv_profile.recent"]),
            first=int(said["kv_profile.first"]),
            recent_type=str(said["kv_profile.type_recent"]),
            statistics=read_statistics(path),
            bits=_float(said.get("kv_profile.bits_per_value")),
            predicted=_float(said.get("kv_profile.kld.predicted")),
            held_out=_float(said.get("kv_profile.kld.held_out")),
            provenance={
                key.removeprefix(prefix): str(value)
                for key, value in said.items()
                if key.startswith(prefix) and isinstance(value, str) and key.removeprefix(prefix) not in fixed
            },
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"profile {path} lacks {error}", _AGAIN) from None
    if len(profile.k) != len(profile.v) or not shape.n_layer:
        raise UsageError(f"profile {path} has no type for every layer", _AGAIN)
    return ProfileFile(
        path=path,
        name=path.name.removesuffix(".gguf").removesuffix(".kv-profile"),
        sha256=hashlib.sha256(data).hexdigest(),
        shape=shape,
        profile=profile,
        types_k=types_text(profile.k),
        types_v=types_text(profile.v),
    )


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def write_profile(profile: Profile, model: ModelShape, out: Path) -> None:
    """Write the file.

    Raises:
        UsageError: not a type for every layer.
        EnvironmentProblem: the disk is full.
    """
    if not len(profile.k) == len(profile.v) == model.n_layer:
        raise UsageError(
            f"a profile with {len(profile.k)} types of K and {len(profile.v)} of V for {model.n_layer} layers"
        )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(out, model.arch)
        writer.add_type("kv_profile")
        writer.add_uint32("kv_profile.version", VERSION)
        writer.add_string("kv_profile.model.architecture", model.arch)
        writer.add_uint64("kv_profile.model.n_params", model.n_params)
        writer.add_uint64("kv_profile.model.fingerprint", model.fingerprint)
        writer.add_array("kv_profile.type_k", list(profile.k))
        writer.add_array("kv_profile.type_v", list(profile.v))
        writer.add_uint32("kv_profile.recent", profile.recent)
        writer.add_uint32("kv_profile.first", profile.first)
        writer.add_string("kv_profile.type_recent", profile.recent_type)
        for key, value in (
            ("bits_per_value", profile.bits),
            ("kld.predicted", profile.predicted),
            ("kld.held_out", profile.held_out),
        ):
            if value is not None:
                writer.add_float32(f"kv_profile.{key}", value)
        for key, text in profile.provenance.items():
            writer.add_string(f"kv_profile.{key}", text)
        for name, values in profile.statistics.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
