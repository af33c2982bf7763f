"""--kv-profile in llama.cpp: types by layer, what it says, what it refuses, states."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from tests.support.divergence import tool
from tests.support.layouts import DIM, KV_HEADS, LAYERS, LAYOUTS, write_model
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.kv_profile import ModelShape, Profile, model_shape, write_profile
from turbo_eval.llama.build import Build
from turbo_eval.util.process import child_environment

pytestmark = pytest.mark.build

MIXED = Profile(
    k=("q8_0", "turbo4", "turbo3", "turbo3"), v=("turbo3", "turbo2", "turbo2", "turbo4"), recent=16, first=2
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(LAYOUTS["qwen2"], tmp_path_factory.mktemp("model") / "qwen2.gguf")


@pytest.fixture(scope="module")
def shape(model: Path) -> ModelShape:
    return model_shape(model)


@pytest.fixture(scope="module")
def text(prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "text"
    out.write_bytes(prose.path.read_bytes()[:2000])
    return out


def statistics(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Of all layers, as a calibration file has them."""
    return {
        f"blk.{layer}.{name}": rng.uniform(0.5, 2.0, (KV_HEADS, DIM)).astype(np.float16)
        for layer in range(LAYERS)
        for name in ("k_mean", "k_std", "q_rms")
    }


def perplexity(build: Build, model: Path, text: Path, *args: object, batch: int = 256) -> tuple[str, str]:
    """(final estimate, everything that was said)."""
    base = [
        "-m",
        model,
        "-f",
        text,
        "-c",
        "256",
        "--chunks",
        "1",
        "--no-warmup",
        "-fa",
        "on",
        "-b",
        batch,
        "-ub",
        batch,
    ]
    said = tool(build, "llama-perplexity", *base, *args)
    estimate = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    assert estimate, said[-2000:]
    return estimate[1], said


def test_one_type_everywhere_is_the_pair(
    build: Build, model: Path, shape: ModelShape, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.gguf"
    write_profile(Profile(("turbo4",) * LAYERS, ("turbo3",) * LAYERS, recent=16, first=2), shape, file)
    of_profile, said = perplexity(build, model, text, "--kv-profile", file)
    of_pair, _ = perplexity(
        build, model, text, "-ctk", "turbo4", "-ctv", "turbo3", "--kv-recent", "16", "--kv-first", "2"
    )
    assert of_profile == of_pair
    assert "types: 3.750 bits per value, K 4.250 (turbo4), V 3.250 (turbo3)" in said
    assert "exact window: recent 16, first 2, type q8_0" in said


def test_types_by_layer(build: Build, model: Path, shape: ModelShape, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.gguf"
    write_profile(replace(MIXED, bits=(8.5 + 4.25 + 2 * 3.25 + 3.25 + 2 * 2.25 + 4.25) / 8), shape, file)
    mixed, said = perplexity(build, model, text, "--kv-profile", file)
    assert (
        "types: 3.906 bits per value, K 4.812 (q8_0:0 turbo4:1 turbo3:2-3), "
        "V 3.000 (turbo3:0 turbo2:1-2 turbo4:3)" in said
    )
    others = {
        perplexity(build, model, text, "-ctk", k, "-ctv", v, "--kv-recent", "16", "--kv-first", "2")[0]
        for k, v in (("turbo3", "turbo3"), ("turbo4", "turbo4"), ("turbo3", "turbo2"))
    }
    assert mixed not in others
    one_by_one, _ = perplexity(build, model, text, "--kv-profile", file, batch=1)
    assert float(one_by_one) == pytest.approx(float(mixed), rel=2e-3)


def test_the_window_can_be_overridden(
    build: Build, model: Path, shape: ModelShape, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.gguf"
    write_profile(MIXED, shape, file)
    assert (
        "exact window: off"
        in perplexity(build, model, text, "--kv-profile", file, "--kv-recent", "0", "--kv-first", "0")[1]
    )
    assert (
        "exact window: recent 32, first 2"
        in perplexity(build, model, text, "--kv-profile", file, "--kv-recent", "32")[1]
    )


def test_f16_layers_are_exact(
    build: Build, model: Path, shape: ModelShape, text: Path, tmp_path: Path
) -> None:
    """One quantized layer rotates the cache: the others must not notice."""
    file = tmp_path / "p.gguf"
    write_profile(Profile(("f16",) * 3 + ("q8_0",), ("f16",) * 4, recent=0, first=0), shape, file)
    base = tmp_path / "base.kld"
    args = [
        "-c",
        "256",
        "--chunks",
        "1",
        "--no-warmup",
        "-fa",
        "on",
        "--kl-divergence-base",
        base,
        "-m",
        model,
        "-f",
        text,
    ]
    tool(build, "llama-perplexity", *args)
    said = tool(build, "llama-perplexity", *args, "--kl-divergence", "--kv-profile", file)
    mean = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", said)
    assert mean and abs(float(mean[1])) < 2e-3, said[-1500:]


def test_statistics_make_the_anchor(
    build: Build, model: Path, shape: ModelShape, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "p.gguf"
    write_profile(replace(MIXED, statistics=statistics(np.random.default_rng(0))), shape, file)
    said = perplexity(build, model, text, "--kv-profile", file)[1]
    assert re.search(r"kv_anchor: auto -> on \(anchor: \d/4 layers, balance: \d/4 layers from profile", said)


def test_context_shift(build: Build, model: Path, shape: ModelShape, tmp_path: Path) -> None:
    file = tmp_path / "p.gguf"
    write_profile(replace(MIXED, k=("f16", "q8_0", "turbo4", "turbo3")), shape, file)
    args = [
        "-p",
        "The history",
        "-no-cnv",
        "-c",
        "256",
        "-n",
        "300",
        "--context-shift",
        "--ignore-eos",
        "--temp",
        "0",
    ]
    tool(build, "llama-completion", "-m", model, *args, "-fa", "on", "--kv-profile", file)


def save_and_load(
    build: Build, model: Path, first: Path, second: Path, state: Path
) -> subprocess.CompletedProcess[str]:
    """Save a prompt's state with one profile, load it with another."""
    done = None
    for profile in (first, second):
        argv = [
            build.tool("llama-completion"),
            "-m",
            model,
            "-p",
            "The history of the lighthouse begins",
            "-no-cnv",
        ]
        argv += ["-c", "256", "-n", "4", "--temp", "0", "-fa", "on", "--no-warmup", "--prompt-cache", state]
        argv += ["--kv-profile", profile, "--device", "none", "-fit", "off", "-t", "1"]
        done = subprocess.run(
            [str(a) for a in argv],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=child_environment()[0],
        )
        if profile is first:
            assert done.returncode == 0, done.stderr[-2000:]
            assert state.is_file()
    assert done is not None
    return done


def test_a_state_belongs_to_its_profile(build: Build, model: Path, shape: ModelShape, tmp_path: Path) -> None:
    one, other, swapped = (tmp_path / f"{name}.gguf" for name in ("one", "other", "swapped"))
    write_profile(MIXED, shape, one)
    write_profile(replace(MIXED, provenance={"date": "2026-01-01"}), shape, other)
    write_profile(replace(MIXED, v=("turbo2", "turbo3", "turbo2", "turbo4")), shape, swapped)
    same = save_and_load(build, model, one, other, tmp_path / "a.state")
    assert same.returncode == 0, same.stderr[-2000:]
    refused = save_and_load(build, model, one, swapped, tmp_path / "b.state")
    assert refused.returncode > 0
    assert "the state was saved with V of type turbo3 in layer" in refused.stderr


# -- what is refused ---------------------------------------------------------------------------------

Writer = Any
Edit = Callable[[dict[str, Any]], None]


def _key(key: str, kind: str, value: Any) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        values["keys"][key] = (kind, value)

    return edit


def _without(key: str) -> Edit:
    return lambda values: values["keys"].pop(key)


def _tensor(name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        values["tensors"][name] = change(values["tensors"][name])

    return edit


def _one_value(value: float) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    def change(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        data = data.copy()
        data.flat[5] = value
        return data

    return change


def _renamed(old: str, new: str | None) -> Edit:
    def edit(values: dict[str, Any]) -> None:
        data = values["tensors"].pop(old)
        if new:
            values["tensors"][new] = data

    return edit


MALFORMED: dict[str, tuple[Edit, str]] = {
    "no version": (_without("version"), "'kv_profile.version' is missing"),
    "version of another type": (_key("version", "string", "1"), "'kv_profile.version' has type str, not u32"),
    "unknown version": (_key("version", "uint32", 2), "it has version 2, this program reads version 1"),
    "another architecture": (_key("model.architecture", "string", "llama"), "it was made for another model"),
    "another size": (_key("model.n_params", "uint64", 1), "it was made for another model"),
    "another fine-tune": (_key("model.fingerprint", "uint64", 1), "another model of the same size"),
    "types as numbers": (_key("type_k", "array", [8, 8, 8, 8]), "is an array of i32, not of strings"),
    "types as one string": (_key("type_k", "string", "turbo3"), "'kv_profile.type_k' has type str, not arr"),
    "a type too few": (_key("type_v", "array", ["turbo3"] * 3), "has 3 types, the model has 4 layers"),
    "unknown type": (_key("type_k", "array", ["turbo3"] * 3 + ["turbo9"]), "there is no cache type 'turbo9'"),
    "a weight type": (_key("type_k", "array", ["turbo3"] * 3 + ["q4_K"]), "no cache type 'q4_K'"),
    "a layer without type": (_key("type_k", "array", ["turbo3"] * 3 + ["none"]), "has no type for layer 3"),
    "bits that are not those": (_key("bits_per_value", "float32", 3.0), "it says 3.000 bits per value"),
    "bits that are NaN": (_key("bits_per_value", "float32", np.nan), "'kv_profile.bits_per_value' is nan"),
    "a KLD below zero": (_key("kld.held_out", "float32", -1.0), "'kv_profile.kld.held_out' is -1"),
    "a window of 4 billion": (_key("recent", "uint32", 2**32 - 1), "'kv_profile.recent' is 4294967295"),
    "a negative window": (_key("first", "int32", -1), "'kv_profile.first' has type i32, not u32"),
    "a window of turbo3": (_key("type_recent", "string", "turbo3"), "is neither f16 nor q8_0, but 'turbo3'"),
    "NaN": (_tensor("blk.1.k_mean", _one_value(np.nan)), "tensor 'blk.1.k_mean': value 5 is nan"),
    "infinity": (_tensor("blk.3.q_rms", _one_value(np.inf)), "tensor 'blk.3.q_rms': value 5 is inf"),
    "zero deviation": (_tensor("blk.2.k_std", _one_value(0.0)), "tensor 'blk.2.k_std': value 5 is 0"),
    "negative deviation": (_tensor("blk.2.k_std", _one_value(-1.0)), "tensor 'blk.2.k_std': value 5 is -1"),
    "a shape": (_tensor("blk.0.k_std", lambda data: data[:, :32]), "'blk.0.k_std' has shape [32, 2, 1, 1]"),
    "a transposed shape": (_tensor("blk.0.k_std", lambda data: data.T), "has shape [2, 64, 1, 1]"),
    "integers": (_tensor("blk.0.k_std", lambda data: data.astype(np.int32)), "'blk.0.k_std' has type i32"),
    "a tensor is missing": (_renamed("blk.1.q_rms", None), "tensor 'blk.1.q_rms' is missing"),
    "a tensor of no layer": (_renamed("blk.1.q_rms", "blk.9.q_rms"), "'blk.9.q_rms' belongs to no layer"),
    "a foreign tensor": (_renamed("blk.1.q_rms", "output.weight"), "'output.weight' belongs to no layer"),
}  # fmt: skip


def write_raw(shape: ModelShape, edit: Edit, out: Path) -> None:
    """A profile as the writer makes it, with one thing changed."""
    keys: dict[str, tuple[str, Any]] = {
        "version": ("uint32", 1),
        "model.architecture": ("string", shape.arch),
        "model.n_params": ("uint64", shape.n_params),
        "model.fingerprint": ("uint64", shape.fingerprint),
        "type_k": ("array", list(MIXED.k)),
        "type_v": ("array", list(MIXED.v)),
        "recent": ("uint32", 16),
        "first": ("uint32", 2),
        "type_recent": ("string", "q8_0"),
    }
    values: dict[str, Any] = {"keys": keys, "tensors": statistics(np.random.default_rng(0))}
    edit(values)
    writer = GGUFWriter(out, shape.arch)
    writer.add_type("kv_profile")
    for key, (kind, value) in values["keys"].items():
        getattr(writer, f"add_{kind}")(f"kv_profile.{key}", value)
    for name, data in values["tensors"].items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refusal(build: Build, model: Path, *args: object) -> str:
    """What llama-completion says instead of running; it must end by itself."""
    argv = [
        build.tool("llama-completion"),
        "-m",
        model,
        "-p",
        "a",
        "-n",
        "1",
        "-c",
        "256",
        "-no-cnv",
        "-fa",
        "on",
    ]
    argv += ["--no-warmup", "--device", "none", "-fit", "off", "-t", "1", *args]
    done = subprocess.run(
        [str(a) for a in argv],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=child_environment()[0],
    )
    assert done.returncode > 0, (done.returncode, done.stderr[-1000:])
    assert "exact window: recent" not in done.stderr
    return done.stderr


def test_what_write_raw_makes_is_accepted(
    build: Build, model: Path, shape: ModelShape, text: Path, tmp_path: Path
) -> None:
    write_raw(shape, lambda values: None, tmp_path / "p.gguf")
    assert "balance: " in perplexity(build, model, text, "--kv-profile", tmp_path / "p.gguf")[1]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(build: Build, model: Path, shape: ModelShape, tmp_path: Path, name: str) -> None:
    edit, sentence = MALFORMED[name]
    write_raw(shape, edit, tmp_path / "p.gguf")
    said = refusal(build, model, "--kv-profile", tmp_path / "p.gguf")
    [line] = [line for line in said.splitlines() if "KV profile: '" in line]
    assert "p.gguf' cannot be used: " in line
    assert sentence in line


def test_files_that_are_no_profiles(build: Build, model: Path, shape: ModelShape, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_raw(shape, lambda values: None, whole)
    data = whole.read_bytes()
    cases = {
        "empty": b"",
        "text": b"K turbo4, V turbo3\n" * 100,
        "half": data[: len(data) // 2],
        "header": data[:100],
        "many tensors": data[:8] + struct.pack("<QQ", 2**62, 2**62) + data[24:],
    }
    for name, content in cases.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        assert "cannot be used: " in refusal(build, model, "--kv-profile", file), name
    assert "it is neither a KV profile nor a calibration file" in refusal(build, model, "--kv-profile", model)
    assert "there is no file" in refusal(build, model, "--kv-profile", tmp_path / "absent.gguf")
    assert "there is no file" in refusal(build, model, "--kv-profile", tmp_path)


def test_types_beside_a_profile(build: Build, model: Path, shape: ModelShape, tmp_path: Path) -> None:
    file = tmp_path / "p.gguf"
    write_profile(MIXED, shape, file)
    assert "leave out --cache-type-k" in refusal(build, model, "--kv-profile", file, "-ctk", "turbo3")
    assert "use --kv-profile with it" in refusal(build, model, "--kv-anchor", file, "-ctk", "turbo3")


def test_without_flash_attention(build: Build, model: Path, shape: ModelShape, tmp_path: Path) -> None:
    file = tmp_path / "p.gguf"
    write_profile(MIXED, shape, file)
    refusal(build, model, "--kv-profile", file, "-fa", "off")
