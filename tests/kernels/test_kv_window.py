"""The exact window of the KV cache: llama.cpp's test of it, what the start-up line says, what is refused."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from turbo_eval.evidence.kv_eval import PATHS, read_kv_eval
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


def test_what_is_off_by_default_is_off(build: Build, smollm: ModelFile, tmp_path: Path) -> None:
    """Beside 8 bits and more there is no window: the same bits as with recent 0 and first 0."""
    text, out = tmp_path / "text.txt", tmp_path / "eval.bin"
    text.write_text("The lighthouse keeper wrote down the weather of every day, and so did his son. " * 40)
    off = ",recent=0,first=0"
    pairs = ("f16:f16", "q8_0:q8_0", "q8_0:f16", "turbo3:turbo3")
    argv: list[str | Path] = [build.tool("llama-kv-eval"), "-m", smollm.path, "-f", text, "--out", out]
    argv += ["-c", "64", "-b", "64", "--chunks", "1", "--one-token", "1", "-fa", "on", "-t", "1"]
    argv += [part for pair in pairs for part in ("--pair", pair, "--pair", pair + off)]
    subprocess.run(argv, check=True, capture_output=True, timeout=600)
    found = read_kv_eval(out)
    for number, path in product(range(len(pairs)), PATHS):
        default, asked = (found.figures(1 + 2 * number + i, path) for i in (0, 1))
        same = all(np.array_equal(getattr(default, n), getattr(asked, n)) for n in ("nll", "kld", "dp"))
        # beside turbo3 there is one: the comparison sees it
        assert same == (pairs[number] != "turbo3:turbo3"), (pairs[number], path)
