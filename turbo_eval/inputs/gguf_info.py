"""What the harness needs to know about a model, read from its GGUF header.

Only the header is walked, and numbers and enum names come from the `gguf` package. Its own
GGUFReader builds an array per token first, which takes seconds on a vocabulary of 150,000.
Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType, LlamaFileType
from pydantic import BaseModel, ConfigDict

from turbo_eval.errors import UsageError

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_ALIGNMENT = 32
_DIMENSIONS = 4  # ggml.h: GGML_MAX_DIMS
_NESTED = 4  # arrays of arrays; nobody writes them


class GgufInfo(BaseModel):
    """Shape of a model. Where layers differ, counts are the largest; head dims are in values."""

    model_config = ConfigDict(frozen=True)

    arch: str
    name: str
    file_type: str  # e.g. "MOSTLY_Q4_K_M"
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    n_vocab: int
    tensor_count: int


class _Array(list[object]):
    """An array's values; of strings only the count is kept, in `length`."""

    length: int = 0


class Header:
    """One header, read front to back. struct.error means that the file ends too early.

    Attributes:
        fields: metadata by key; of an array of strings only the count is kept.
        tensors: (ggml type id, shape with the shortest stride first, offset from data_start) by name.
        data_start: where the tensors' data begin, in bytes.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        version = self._one("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported")
        tensors, pairs = self._one("Q"), self._one("Q")
        self.fields: dict[str, object] = {}
        for _ in range(pairs):
            key = self._string()
            self.fields[key] = self._value(GGUFValueType(self._one("I")))
        self.tensor_count = tensors
        self.data_end = 0
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment}")
        self.tensors: dict[str, tuple[int, list[int], int]] = {}  # name: ggml type, shape, offset
        for _ in range(tensors):
            name = self._string()
            dims = [self._one("Q") for _ in range(self._dimensions(name))]
            kind, offset = self._one("I"), self._one("Q")
            self.tensors[name] = kind, dims, offset
            self.data_end = max(self.data_end, offset + _tensor_bytes(kind, dims))
        self.data_start = -(-stream.tell() // alignment) * alignment
        if tensors:
            self.data_end += self.data_start

    def _dimensions(self, name: str) -> int:
        count = self._one("I")
        if count > _DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {count} dimensions")
        return count

    def _one(self, code: str) -> int:
        return int(self._scalar(code))

    def _scalar(self, code: str) -> int | float | bool:
        width = struct.calcsize("<" + code)
        value: int | float | bool = struct.unpack("<" + code, self._stream.read(width))[0]
        return value

    def _skip(self, count: int) -> None:
        if self._stream.tell() + count > self._size:
            raise struct.error
        self._stream.seek(count, 1)

    def _string(self) -> str:
        length = self._one("Q")
        if length > self._size:
            raise struct.error
        return self._stream.read(length).decode("utf-8", "replace")

    def _value(self, kind: GGUFValueType, depth: int = 0) -> object:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._scalar(_SCALARS[kind])
        inner, length = GGUFValueType(self._one("I")), self._one("Q")
        array = _Array()
        array.length = length
        if inner == GGUFValueType.STRING:
            for _ in range(length):
                self._skip(self._one("Q"))
        elif inner == GGUFValueType.ARRAY:
            if depth == _NESTED:
                raise ValueError("arrays of arrays of arrays")
            array.extend(self._value(inner, depth + 1) for _ in range(length))
        elif length <= 4096:
            array.extend(self._scalar(_SCALARS[inner]) for _ in range(length))
        else:
            self._skip(length * struct.calcsize("<" + _SCALARS[inner]))
        return array


def _tensor_bytes(kind: int, dims: list[int]) -> int:
    """Size of a tensor's data; 0 for a type that the installed `gguf` does not know."""
    try:
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return 0
    count = 1
    for dim in dims:
        count *= dim
    return count // block * width


def read_header(path: Path) -> Header:
    """Read the header of `path` and check that the data it announces is there.

    Raises:
        UsageError: missing, not GGUF, or truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(4)
            if magic != struct.pack("<I", GGUF_MAGIC):
                raise UsageError(
                    f"{path} is not a GGUF file: it starts with {magic!r}", "name a model in GGUF format"
                )
            header = Header(stream, size)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"there is no model file {path}", "check the path") from error
    except PermissionError as error:
        raise UsageError(f"{path} may not be read", "change its permissions") from error
    except struct.error as error:
        raise UsageError(
            f"{path} is truncated: it ends within its GGUF header ({size} bytes)", "download it again"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{path} cannot be read as GGUF ({error})", "download or convert it again"
        ) from error
    if size < header.data_end:
        raise UsageError(f"{path} is truncated: {size} bytes of {header.data_end}", "download it again")
    return header


def read_gguf_info(path: Path) -> GgufInfo:
    """Describe the model in `path`.

    Raises:
        UsageError: missing, not GGUF, truncated, or without the keys of a language model.
    """
    return describe(path, read_header(path))


def read_vectors(path: Path, suffix: str) -> dict[str, list[float]]:
    """The F32 tensors whose name ends in `suffix`, e.g. "attn_k.bias", flattened, by name.

    Raises:
        UsageError: missing, not GGUF, truncated.
    """
    header = read_header(path)
    with path.open("rb") as stream:
        found = {}
        for name, (kind, dims, offset) in header.tensors.items():
            if name.endswith(suffix) and kind == GGMLQuantizationType.F32:
                stream.seek(header.data_start + offset)
                size = _tensor_bytes(kind, dims)
                found[name] = list(struct.unpack(f"<{size // 4}f", stream.read(size)))
    return found


def read_numbers(path: Path) -> dict[str, float]:
    """The header's numeric fields by key.

    Raises:
        UsageError: missing, not GGUF, truncated.
    """
    header = read_header(path)
    return {key: float(value) for key, value in header.fields.items() if isinstance(value, int | float)}


def describe(path: Path, header: Header) -> GgufInfo:
    """The shape of the model that `header` of `path` is about.

    Raises:
        UsageError: it lacks the keys of a language model.
    """
    fields = header.fields
    arch = str(fields.get("general.architecture", ""))

    def number(key: str, default: int | None = None) -> int:
        value = fields.get(f"{arch}.{key}", default)
        if isinstance(value, _Array):
            value = max((item for item in value if isinstance(item, int)), default=default)
        if not isinstance(value, int):
            raise UsageError(
                f"{path} is GGUF, but has no {arch or '?'}.{key}",
                "name a language model",
            )
        return value

    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = width // heads if heads else 0
    tokens = fields.get("tokenizer.ggml.tokens")
    stated = fields.get("general.file_type")
    try:
        file_type = LlamaFileType(stated).name if isinstance(stated, int) else "not stated"
    except ValueError:
        file_type = f"file type {stated}"
    return GgufInfo(
        arch=arch,
        name=str(fields.get("general.name", path.stem)),
        file_type=file_type,
        n_layer=number("block_count"),
        n_embd=width,
        n_head=heads,
        n_head_kv=number("attention.head_count_kv", heads),
        head_dim_k=number("attention.key_length", head_dim),
        head_dim_v=number("attention.value_length", head_dim),
        n_ctx_train=number("context_length"),
        n_vocab=tokens.length if isinstance(tokens, _Array) else 0,
        tensor_count=header.tensor_count,
    )
