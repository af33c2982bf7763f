"""The exact window of the KV cache: llama.cpp's test of it, what the start-up line says, what is refused."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build

WINDOW = re.compile(
    r"llama_kv_cache: exact window: recent (\d+), first (\d+), type (\w+), (\d+) cells/seq, ([\d.]+) MiB; "
    r"([\d.]+) bits per value, ([\d.]+) with the window at (\d+) cells"
)
SIZE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")


def test_random_operations_and_small_models(build: Build) -> None:
    """Every key is used once, exact where it must be; batches, sequences, states, shifts change nothing."""
    done = subprocess.run(
        [build.tool("test-kv-window"), "3000", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert done.returncode == 0, "\n".join(s for s in done.stdout.splitlines() if "OK" not in s)
    assert done.stdout.endswith("0 failures\n")
    assert len(re.findall(r"^slots: .*: OK$", done.stdout, re.M)) == 22
    for arch in ("llama", "qwen2", "gemma3", "lfm2"):
        assert len(re.findall(rf"^{arch} .*: OK$", done.stdout, re.M)) >= 25, arch


def _start(build: Build, model: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [
        build.tool("llama-completion"),
        "-m",
        model,
        "-c",
        "8192",
        "-p",
        "a",
        "-n",
        "1",
    ]
    return subprocess.run(
        [*command, "-no-cnv", "-lv", "4", "--no-warmup", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def test_start_up_line_and_memory(build: Build, smollm: ModelFile) -> None:
    """By default 128 and 4 beside turbo types, at most 5 % more memory at 8192; nothing beside q8_0."""
    turbo = ["-ctk", "turbo3", "-ctv", "turbo3", "-fa", "on"]
    found = _start(build, smollm.path, *turbo)
    line = WINDOW.search(found.stdout)
    assert line, found.stdout
    assert line.groups()[:3] == ("128", "4", "q8_0")
    assert int(line[4]) <= 1.15 * 132
    assert line[6] == "3.25" and float(line[7]) <= 1.05 * 3.25 and line[8] == "8192"

    off = _start(build, smollm.path, *turbo, "--kv-recent", "0")
    assert "llama_kv_cache: exact window: off (not wanted)" in off.stdout
    with_window, without = SIZE.search(found.stdout), SIZE.search(off.stdout)
    assert with_window and without
    assert float(with_window[1]) - float(without[1]) == pytest.approx(float(line[5]), abs=0.02)

    plain = _start(build, smollm.path, "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")
    assert "exact window: off (K and V have 8 bits per value or more)" in plain.stdout


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-ctk", "turbo3", "-fa", "off", "--kv-recent", "16"], "Flash Attention is off"),
        (["--kv-recent", "-1"], "--kv-recent: '-1' is neither auto nor a number"),
        (["--kv-first", "4x"], "--kv-first: '4x' is neither auto nor a number"),
        (["--kv-recent-type", "q4_0"], "--kv-recent-type: 'q4_0' is none of auto, f16, q8_0"),
    ],
)
def test_refused_in_a_sentence(build: Build, smollm: ModelFile, args: list[str], sentence: str) -> None:
    done = _start(build, smollm.path, *args)
    assert done.returncode != 0
    assert sentence in done.stdout


def test_switched_off_with_a_warning_where_it_was_not_asked_for(build: Build, smollm: ModelFile) -> None:
    done = _start(build, smollm.path, "-ctk", "turbo3", "-fa", "off")
    assert done.returncode == 0, done.stdout
    assert "llama_kv_cache: exact window: off (Flash Attention is off)" in done.stdout
