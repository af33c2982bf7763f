"""The file that `--kv-profile` reads: one GGUF that makes a quantized cache good for one model.

Types of K and V for each layer, the exact window, and the statistics of a calibration file, with
where all that comes from. llama.cpp checks every value (src/llama-kv-profile.cpp of the patches).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Promise:
    """What a profile says of itself: `held_out` is its measured mean KL divergence in nats, None if it isn't
    there; the text it was measured on, "" and 0 likewise."""

    held_out: float | None
    bits: float | None
    corpus: str
    ctx: int
    chunks: int


def read_promise(path: Path) -> Promise:
    """Read it from the file.

    Raises:
        UsageError: missing, or no profile.
    """
    try:
        said = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UsageError(f"{path} is no KV profile: {error}", "`turbo-eval tune` makes one") from None
    if "kv_profile.type_k" not in said:
        raise UsageError(f"{path} is no KV profile: it has no types", "`turbo-eval tune` makes one")

    def number(key: str) -> float | None:
        value = said.get(f"kv_profile.{key}")
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def count(key: str) -> int:
        text = str(said.get(f"kv_profile.{key}", ""))
        return int(text) if text.isdecimal() else 0

    return Promise(
        number("kld.held_out"),
        number("bits_per_value"),
        str(said.get("kv_profile.corpus.name", "")),
        count("context_length"),
        count("chunks"),
    )


def read_statistics(path: Path) -> dict[str, NDArray[np.float16]]:
    """The tensors of a calibration file (see calibrate.py)."""
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


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
