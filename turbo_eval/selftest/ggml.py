"""A build's ggml through ctypes: types, and graphs of one operation on a chosen device."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbo_eval.formats.cache_types import CACHE_TYPES
from turbo_eval.llama.backends import backend as find_backend
from turbo_eval.llama.libraries import library

_HADAMARD = 1  # GGML_HINT_SRC0_IS_HADAMARD
_F32_ACCUMULATOR = 10  # GGML_PREC_F32
_CPU_KINDS, _GPU_KINDS = (0,), (1, 2)  # ggml_backend_dev_type: CPU; GPU and integrated GPU


class GgmlError(Exception):
    """ggml refused or failed; the message is the reason."""


@dataclass(frozen=True)
class Segment:
    """A second segment of keys and values (ggml_flash_attn_ext_add_window).

    Attributes:
        kind: type of both, "f16" or "q8_0".
        k, v: (slots, KV heads, bytes a head vector).
        mask: (queries, slots), added to the scores.
    """

    kind: str
    k: NDArray[np.uint8]
    v: NDArray[np.uint8]
    mask: NDArray[np.float16]


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block", c_int64),
        ("block_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float_ref", c_void_p),
    )


_V, _I64 = c_void_p, c_int64
# name: (library, result, arguments)
_FUNCTIONS: dict[str, tuple[str, Any, list[Any]]] = {
    "ggml_get_type_traits": ("base", POINTER(_TypeTraits), [c_int]),
    "ggml_quantize_chunk": ("base", c_size_t, [c_int, _V, _V, _I64, _I64, _I64, _V]),
    "ggml_init": ("base", _V, [_InitParams]),
    "ggml_free": ("base", None, [_V]),
    "ggml_new_tensor_4d": ("base", _V, [_V, c_int, _I64, _I64, _I64, _I64]),
    "ggml_permute": ("base", _V, [_V, _V, c_int, c_int, c_int, c_int]),
    "ggml_mul_mat": ("base", _V, [_V, _V, _V]),
    "ggml_mul_mat_set_hint": ("base", None, [_V, c_int]),
    "ggml_prec_set_acc": ("base", c_bool, [_V, c_int]),
    "ggml_set_rows": ("base", _V, [_V, _V, _V, _V]),
    "ggml_flash_attn_ext": ("base", _V, [_V, _V, _V, _V, _V, c_float, c_float, c_float]),
    "ggml_nbytes": ("base", c_size_t, [_V]),
    "ggml_new_graph": ("base", _V, [_V]),
    "ggml_build_forward_expand": ("base", None, [_V, _V]),
    "ggml_log_set": ("base", None, [_V, _V]),
    "ggml_backend_dev_name": ("base", c_char_p, [_V]),
    "ggml_backend_dev_description": ("base", c_char_p, [_V]),
    "ggml_backend_dev_type": ("base", c_int, [_V]),
    "ggml_backend_dev_backend_reg": ("base", _V, [_V]),
    "ggml_backend_reg_name": ("base", c_char_p, [_V]),
    "ggml_backend_dev_init": ("base", _V, [_V, c_char_p]),
    "ggml_backend_supports_op": ("base", c_bool, [_V, _V]),
    "ggml_backend_alloc_ctx_tensors": ("base", _V, [_V, _V]),
    "ggml_backend_buffer_free": ("base", None, [_V]),
    "ggml_backend_tensor_set": ("base", None, [_V, _V, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": ("base", None, [_V, _V, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": ("base", c_int, [_V, _V]),
    "ggml_backend_load_all_from_path": ("ggml", None, [c_char_p]),
    "ggml_backend_dev_count": ("ggml", c_size_t, []),
    "ggml_backend_dev_get": ("ggml", _V, [c_size_t]),
}
_ADD_WINDOW = "ggml_flash_attn_ext_add_window"  # void; of the patches
_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


def _silent(level: int, text: bytes, data: int | None) -> None:
    if level >= 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def _present(base: ctypes.CDLL) -> list[str]:
    """The cache types that the library has: each quantized one comes with its decoder."""
    return [t.name for t in CACHE_TYPES.values() if t.block == 1 or hasattr(base, f"dequantize_row_{t.name}")]


class Ggml:
    """The libraries of `bin_dir`, and one device of theirs.

    Args:
        backend: name of one of the backends.
        device: a ggml device name that wins over `backend`, e.g. "CUDA1".

    Attributes:
        bin_dir: where they lie.

    Raises:
        GgmlError: a library, a function or the device is not there; the device doesn't start.
    """

    def __init__(self, bin_dir: Path, backend: str, device: str = "") -> None:
        self.bin_dir = bin_dir
        try:
            libraries = {
                name: ctypes.CDLL(str(library(bin_dir, file)), mode=ctypes.RTLD_GLOBAL)
                for name, file in (("base", "ggml-base"), ("ggml", "ggml"))
            }
            self._call: dict[str, Callable[..., Any]] = {}
            self._windowed = hasattr(libraries["base"], _ADD_WINDOW)
            if self._windowed:
                add_window = libraries["base"][_ADD_WINDOW]
                add_window.restype, add_window.argtypes = None, [_V, _V, _V, _V]
                self._call[_ADD_WINDOW] = add_window
            for name, (place, result, arguments) in _FUNCTIONS.items():
                function = libraries[place][name]
                function.restype, function.argtypes = result, arguments
                self._call[name] = function
        except (OSError, AttributeError) as error:
            raise GgmlError(str(error)) from None
        self._log = _LOG(_silent)  # must outlive every call
        self._call["ggml_log_set"](self._log, None)
        self._call["ggml_backend_load_all_from_path"](str(bin_dir).encode())
        self.types = self._types({*_present(libraries["base"]), "i64"})
        found = self._find(backend, device)
        self.device = self._text("ggml_backend_dev_name", found)
        self.description = self._text("ggml_backend_dev_description", found)
        self._backend = self._call["ggml_backend_dev_init"](found, None)
        if not self._backend:
            raise GgmlError(f"the device {self.device} does not start")

    def _text(self, function: str, argument: Any) -> str:
        said = self._call[function](argument)
        return said.decode(errors="replace") if said else ""

    def _types(self, wanted: set[str]) -> dict[str, int]:
        """Numbers of the types by name: they move when upstream adds types.

        ggml doesn't say how many there are, and reads past the end of its table: only types that must exist
        may be wanted, so that the search ends with the last of them.
        """
        names: dict[str, int] = {}
        number = 0
        while wanted - names.keys():
            traits = self._call["ggml_get_type_traits"](number)
            if name := traits.contents.type_name:
                names[name.decode()] = number
            number += 1
        return names

    def _find(self, backend: str, device: str) -> Any:
        seen, wanted = [], find_backend(backend)
        for number in range(self._call["ggml_backend_dev_count"]()):
            candidate = self._call["ggml_backend_dev_get"](number)
            name = self._text("ggml_backend_dev_name", candidate)
            registry = self._text(
                "ggml_backend_reg_name", self._call["ggml_backend_dev_backend_reg"](candidate)
            )
            seen.append(name)
            if name == device:
                return candidate
            kind = self._call["ggml_backend_dev_type"](candidate)
            kinds = _GPU_KINDS if wanted.gpu else _CPU_KINDS
            if not device and kind in kinds and registry in wanted.registries:
                return candidate
        raise GgmlError(f"there is no device {device or backend} (there are: {', '.join(seen) or 'none'})")

    def block(self, name: str) -> tuple[int, int]:
        """Values and bytes of one block of a type."""
        traits = self._call["ggml_get_type_traits"](self.types[name]).contents
        return int(traits.block), int(traits.type_size)

    def quantize(self, name: str, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows x (n, d) by ggml's reference encoder; (n, bytes a row)."""
        values, size = self.block(name)
        x = np.ascontiguousarray(x, np.float32)
        out = np.zeros((len(x), x.shape[1] // values * size), np.uint8)
        if name == "f32":
            return x.view(np.uint8).reshape(out.shape)
        self._call["ggml_quantize_chunk"](
            self.types[name], x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], None
        )
        return out

    def dequantize(self, name: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows (n, bytes) through the type's to_float; (n, d). Unwritten values stay NaN."""
        values, size = self.block(name)
        rows = np.ascontiguousarray(rows)
        out = np.full((len(rows), rows.shape[1] // size * values), np.nan, np.float32)
        traits = self._call["ggml_get_type_traits"](self.types[name]).contents
        if not traits.to_float:
            raise GgmlError(f"{name} has no to_float")
        function = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)(traits.to_float)
        function(rows.ctypes.data, out.ctypes.data, out.size)
        return out

    def hadamard(self, matrix: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
        """matrix (n, n) times each row of x (rows, n), marked as Hadamard: upstream's rotation."""
        n = len(matrix)

        def build(new: Callable[..., Any], context: Any) -> Any:
            result = self._call["ggml_mul_mat"](context, new("f32", n, n), new("f32", n, len(x)))
            self._call["ggml_mul_mat_set_hint"](result, _HADAMARD)
            return result

        out = self._run(build, [matrix, x], x.size * 4)
        return out.view(np.float32).reshape(x.shape)

    def set_rows(self, name: str, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows x (n, d) written by the device as a cache write does, in reverse order; (n, bytes)."""
        values, size = self.block(name)
        n, d = x.shape
        order = np.arange(n, dtype=np.int64)[::-1].copy()
        width = d // values * size

        def build(new: Callable[..., Any], context: Any) -> Any:
            source, rows, target = new("f32", d, n), new("i64", n), new(name, d, n)
            return self._call["ggml_set_rows"](context, target, source, rows)

        out = self._run(build, [x, order, np.full(n * width, 255, np.uint8)], n * width)
        return out.reshape(n, width)[::-1]

    def attention(
        self,
        q: NDArray[np.float32],
        k: NDArray[np.uint8],
        v: NDArray[np.uint8],
        mask: NDArray[np.float16],
        types: tuple[str, str],
        *,
        scale: float,
        window: Segment | None = None,
    ) -> NDArray[np.float32]:
        """Flash attention as the graph builds it: cache rows hold all KV heads of a position.

        Args:
            q: (heads, queries, d).
            k, v: (positions, KV heads, bytes a head vector) of `types`.
            mask: (queries, positions), added to the scores.
            window: more keys and values, under the same softmax.

        Returns:
            (queries, heads, d of V).

        Raises:
            GgmlError: the device has no kernel for it, or the build knows of no second segment.
        """
        heads, queries, d = q.shape
        positions, kv_heads, width = v.shape
        values, size = self.block(types[1])
        dv = width // size * values

        def build(new: Callable[..., Any], context: Any) -> Any:
            qt = new("f32", d, queries, heads)
            kt, vt = new(types[0], d, kv_heads, positions), new(types[1], dv, kv_heads, positions)
            mt = new("f16", positions, queries)
            permuted = [self._call["ggml_permute"](context, t, 0, 2, 1, 3) for t in (kt, vt)]
            result = self._call["ggml_flash_attn_ext"](context, qt, *permuted, mt, scale, 0.0, 0.0)
            self._call["ggml_prec_set_acc"](result, _F32_ACCUMULATOR)
            if window:
                slots, kind = window.mask.shape[1], window.kind
                rows = (new(kind, d, kv_heads, slots), new(kind, dv, kv_heads, slots))
                permuted = [self._call["ggml_permute"](context, t, 0, 2, 1, 3) for t in rows]
                self._call[_ADD_WINDOW](result, *permuted, new("f16", slots, queries))
            return result

        inputs: list[NDArray[Any]] = [q, k, v, mask]
        if window:
            if not self._windowed:
                raise GgmlError("this build has no exact window")
            inputs += [window.k, window.v, window.mask]
        out = self._run(build, inputs, queries * heads * dv * 4)
        return out.view(np.float32).reshape(queries, heads, dv)

    def _run(
        self, build: Callable[[Callable[..., Any], Any], Any], inputs: list[NDArray[Any]], size: int
    ) -> NDArray[np.uint8]:
        """Compute one operation on the device; inputs in the order `build` makes their tensors.

        The result's memory is NaN before: an operation that dispatches to nothing must show.
        """
        call = self._call
        context = call["ggml_init"](_InitParams(1 << 20, None, True))
        tensors: list[Any] = []

        def new(name: str, *shape: int) -> Any:
            sizes = (*shape, *(1,) * (4 - len(shape)))
            tensors.append(call["ggml_new_tensor_4d"](context, self.types[name], *sizes))
            return tensors[-1]

        buffer = None
        try:
            result = build(new, context)
            if not call["ggml_backend_supports_op"](self._backend, result):
                raise GgmlError(f"{self.device} has no kernel for it: it would run on the CPU or nowhere")
            graph = call["ggml_new_graph"](context)
            call["ggml_build_forward_expand"](graph, result)
            buffer = call["ggml_backend_alloc_ctx_tensors"](context, self._backend)
            if not buffer:
                raise GgmlError(f"{self.device} has no memory for it")
            poison = np.full(size, 255, np.uint8)
            call["ggml_backend_tensor_set"](result, poison.ctypes.data, 0, size)
            for tensor, data in zip(tensors, inputs, strict=True):
                data = np.ascontiguousarray(data)
                if data.nbytes != call["ggml_nbytes"](tensor):
                    raise GgmlError(
                        f"{data.nbytes} bytes for a tensor of {call['ggml_nbytes'](tensor)} bytes"
                    )
                call["ggml_backend_tensor_set"](tensor, data.ctypes.data, 0, data.nbytes)
            status = call["ggml_backend_graph_compute"](self._backend, graph)
            if status != 0:
                raise GgmlError(f"{self.device} computed with status {status}")
            out = np.empty(size, np.uint8)
            call["ggml_backend_tensor_get"](result, out.ctypes.data, 0, size)
            return out
        finally:
            if buffer:
                call["ggml_backend_buffer_free"](buffer)
            call["ggml_free"](context)
