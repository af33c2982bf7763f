"""Run llama-kv-probe for one configuration and read what it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from turbo_eval.errors import RegressionError, UsageError
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.formats.codec import readable
from turbo_eval.formats.window import OFF, Window, resolve
from turbo_eval.inputs.kv_profile import NO_CACHE, read_profile
from turbo_eval.llama.backends import backend
from turbo_eval.llama.build import Build, find_build
from turbo_eval.llama.output import last_error
from turbo_eval.llama.tool import capabilities, check_window
from turbo_eval.util.numbers import AUTO, TokensOrAuto, tokens_or_auto
from turbo_eval.util.process import child_environment, run

TOOL = "llama-kv-probe"
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Setup:
    """One side: `backend=cpu,k=turbo4,v=turbo3,anchor=off,recent=128,first=4,bin=DIR,env.NAME=VALUE`.

    `profile=FILE` in place of `k` and `v`: the types of a KV profile.
    """

    text: str
    backend: str = "cpu"
    k: str = "f16"
    v: str = "f16"
    profile: str = ""
    anchor: str = ""
    window: Window = OFF
    bin_dir: str = ""
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Setup:
        """Read it.

        Raises:
            UsageError: an unknown key, backend or type.
        """
        known: dict[str, str] = {}
        sizes: dict[str, TokensOrAuto] = {"recent": 0, "first": AUTO}
        env: dict[str, str] = {}
        for part in filter(None, text.split(",")):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if equals and key.startswith("env."):
                env[key.removeprefix("env.")] = value
            elif equals and key in sizes:
                sizes[key] = tokens_or_auto(f"{key}= in {text!r}", value)[0]
            elif equals and key in ("backend", "k", "v", "profile", "anchor", "bin"):
                known["bin_dir" if key == "bin" else key] = value
            else:
                raise UsageError(
                    f"{part!r} in {text!r} is no setting",
                    "write backend=, k=, v=, profile=, anchor=, recent=, first=, bin= or env.NAME=,"
                    " separated by commas",
                )
        backend(known.get("backend", "cpu"))
        types = [known.get(side, "f16") for side in ("k", "v")]
        if "profile" in known:
            if "k" in known or "v" in known:
                raise UsageError(
                    f"{text!r} names types and a profile, which has types", "leave k= and v= out"
                )
            profile = read_profile(Path(known["profile"])).profile
            types = [t for t in {*profile.k, *profile.v} if t != NO_CACHE]
        for name in (cache_type(t).name for t in types):
            if not readable(name):
                raise UsageError(
                    f"the probe cannot read a cache of {name}: neither gguf nor turbo-eval knows its blocks",
                    "probe a type that llama.cpp's gguf package knows",
                )
        window = resolve(sizes["recent"], sizes["first"], known.get("k", "f16"), known.get("v", "f16"))
        return cls(text, env=env, window=window, **known)

    def build(self) -> Build:
        """The build it runs on."""
        return Build.from_bin_dir(Path(self.bin_dir)) if self.bin_dir else find_build(self.backend)


@dataclass(frozen=True)
class Layer:
    """One layer's tensors, float32, token first.

    `q`, `q_attn`, `fa`, `attn_out` (tokens, heads, d); `k`, `v`, `k_write`, `v_write` (tokens, KV heads,
    d); `k_cache`, `v_cache` bytes (tokens, KV heads, bytes); `l_out` (tokens, n_embd). `rot_*` the
    rotation's group size in the graph, 0 for none; `scale`, `softcap` of the attention.
    """

    number: int
    type_k: str
    type_v: str
    q: Array
    k: Array
    v: Array
    k_write: Array
    v_write: Array
    q_attn: Array
    k_cache: NDArray[np.uint8]
    v_cache: NDArray[np.uint8]
    fa: Array
    attn_out: Array
    l_out: Array
    rot_k: int
    rot_q: int
    rot_v: int
    rot_out: int
    scale: float
    softcap: float
    plain: bool  # no sinks, no ALiBi, no exact window: attention can be recomputed from the above


@dataclass(frozen=True)
class Dump:
    """Layers by number, the tokens and the logits (tokens, vocabulary)."""

    setup: Setup
    layers: dict[int, Layer]
    tokens: NDArray[np.int32]
    logits: Array


def take(
    setup: Setup, *, model: Path, text: Path, tokens: int, threads: int, folder: Path, name: str
) -> Dump:
    """Evaluate the first `tokens` tokens of `text`.

    Raises:
        EnvironmentProblem: the build has no llama-kv-probe.
        UsageError: the build knows no --kv-anchor and one is asked for.
        RegressionError: llama-kv-probe failed; with its reason.
    """
    build = setup.build()
    tool = build.tool(TOOL)
    out, log = folder / f"{name}.gguf", folder / f"{name}.log"
    argv: list[str | Path] = [tool, "-m", model, "-f", text, "-c", str(tokens), "-o", out]
    argv += ["--kv-profile", setup.profile] if setup.profile else ["-ctk", setup.k, "-ctv", setup.v]
    argv += ["-fa", "on", "-t", str(threads), "-fit", "off"]
    argv += backend(setup.backend).device_flags()
    check_window([setup.window.recent], setup.window.first, build)
    if capabilities(build).kv_window:
        argv += ["--kv-recent", str(setup.window.recent), "--kv-first", str(setup.window.first)]
    if setup.anchor:
        if not capabilities(build).kv_anchor:
            raise UsageError(
                f"the build in {build.bin_dir} has no --kv-anchor",
                "leave anchor= out or use the patched build",
            )
        argv += ["--kv-anchor", setup.anchor]
    env, _ = child_environment()
    outcome = run(argv, log=log, env=env | setup.env)
    if outcome.returncode != 0 or not out.is_file():
        how = outcome.signal_name() or f"exit code {outcome.returncode}"
        raise RegressionError(
            f"{TOOL} failed for {setup.text} ({how}): {last_error(outcome.text) or 'it gave no reason'}",
            f"read {log}",
        )
    return read(out, setup)


def read(path: Path, setup: Setup) -> Dump:
    """Read a file of llama-kv-probe.

    Raises:
        UsageError: it holds no layer with flash attention over a KV cache.
    """
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    facts: dict[str, Any] = {
        name.removeprefix("kv_probe."): value.contents()
        for name, value in reader.fields.items()
        if name.startswith("kv_probe.")
    }

    def array(name: str) -> NDArray[Any]:
        tensor = tensors[name]
        return np.array(tensor.data).reshape([int(n) for n in reversed(tensor.shape)])

    tokens = array("tokens").ravel()
    layers: dict[int, Layer] = {}
    for number in sorted({int(name.split(".")[0]) for name in facts if name.endswith(".scale")}):

        def fact(name: str, default: Any = 0, number: int = number) -> Any:
            return facts.get(f"{number}.{name}", default)

        def heads(name: str, d: str, number: int = number) -> Array:
            return array(f"blk.{number}.{name}").reshape(len(tokens), -1, fact(d, number=number))

        def cache(name: str, number: int = number) -> NDArray[np.uint8]:
            rows = array(f"blk.{number}.{name}").view(np.uint8)
            return rows.reshape(len(tokens), fact("n_head_kv", number=number), -1)

        needed = ("q", "k", "v", "k_write", "v_write", "l_out")
        if any(f"blk.{number}.{name}" not in tensors for name in needed):
            continue  # an architecture that names its tensors otherwise
        fa = heads("fa", "head_dim_v")
        rotated = f"blk.{number}.attn_out" in tensors
        layers[number] = Layer(
            number=number,
            type_k=fact("type_k"),
            type_v=fact("type_v"),
            q=heads("q", "head_dim_k"),
            k=heads("k", "head_dim_k"),
            v=heads("v", "head_dim_v"),
            k_write=heads("k_write", "head_dim_k"),
            v_write=heads("v_write", "head_dim_v"),
            q_attn=heads("q_attn", "head_dim_k"),
            k_cache=cache("k_cache"),
            v_cache=cache("v_cache"),
            fa=fa,
            attn_out=heads("attn_out", "head_dim_v") if rotated else fa,
            l_out=array(f"blk.{number}.l_out").reshape(len(tokens), -1),
            rot_k=fact("rot_k"),
            rot_q=fact("rot_q"),
            rot_v=fact("rot_v"),
            rot_out=fact("rot_out"),
            scale=fact("scale"),
            softcap=fact("softcap"),
            # keys in an exact window are missing from the cache's
            plain=not fact("sinks") and not fact("max_bias") and not setup.window,
        )
    if not layers:
        raise UsageError(
            f"{path} holds no layer whose Q, K, V and cache can be compared",
            "the model's architecture is not covered; use one with a plain KV cache",
        )
    return Dump(setup, layers, tokens, array("logits"))
