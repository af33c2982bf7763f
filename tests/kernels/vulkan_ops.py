"""Run test-backend-ops on a Vulkan device against the CPU: `python -m tests.kernels.vulkan_ops`.

The device is the one that GGML_VK_VISIBLE_DEVICES names, else the machine's first, which is llvmpipe where
there is no GPU. Exit 1 when a case fails or none ran. `--ci` runs the lists of `make test`, `--short`
longer ones that llvmpipe still does in minutes.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from turbo_eval.llama.build import find_build

# op → the cases of it that the patches touch
ALL = {
    "SET_ROWS": "turbo[234]",
    "CPY": "turbo[234]",
    "GET_ROWS": "turbo[234]",
    "ROPE_HADAMARD": ".",
    "FLASH_ATTN_EXT": "turbo[234]|win=|type_K=bf16,type_V=(f16|q)|type_K=(f16|q.*),type_V=bf16",
}
# What llvmpipe does in minutes. It compiles an attention pipeline in seconds with heads of 64; with heads of
# 128 in most of a minute with Mesa 22.3 and LLVM 15, in three seconds with Mesa 25 and LLVM 19.
# The exact window is in the dispatch of the cache up to 8 queries, with more in one of its own.
_WINDOWS = "win=((145|177|48|656),type_win=f16|(145|80),type_win=q8_0)"
_SHORT_WINDOW = f"{_WINDOWS},type_K=turbo3,type_V=turbo3,hsk=64"
SHORT = ALL | {
    "FLASH_ATTN_EXT": f"^hsk=64,.*type_K=turbo3,type_V=turbo3.*n_kv_max=0$|{_SHORT_WINDOW}",
}


def _pair(case: str, k: str, v: str) -> str:
    """The case of attention with heads of 64 that starts like `case`, for one pair of types."""
    return f"^hsk=64,hsv=64,{re.escape(case)},.*type_K={k},type_V={v},.*n_kv_max=0$"


def _window(case: str, window: str, k: str, v: str) -> str:
    """The same with an exact window of that type."""
    return f"^win={case},type_win={window},type_K={k},type_V={v},hsk=64,"


# One query of a group of four heads, many queries, lengths that fill no tile, keys split over workgroups,
# sinks, ALiBi, soft-capping, several sequences, conversion to f16: llvmpipe compiles a pipeline for each.
_TURBO = ("turbo2", "turbo3", "turbo4")
_DECODE = "nh=4,nr23=[4,1],kv=113,nb=1,mask=1"
_PREFILL = "nh=4,nr23=[1,1],kv=113,nb=35,mask=1"
_CI_ATTENTION = (
    *(_pair(_DECODE, k, v) for k, v in (("turbo2", "turbo2"), ("turbo4", "q8_0"), ("f16", "turbo3"))),
    *(_pair(_PREFILL, k, v) for k, v in (("turbo4", "turbo3"), ("q8_0", "turbo2"), ("turbo3", "f16"))),
    _pair("nh=2,nr23=[1,3],kv=1025,nb=1,mask=1,sinks=1", "turbo3", "turbo3"),
    _pair("nh=1,nr23=[24,1],kv=1000,nb=3,mask=1,sinks=1", "turbo3", "turbo3"),
    _pair("nh=1,nr23=[16,1],kv=257,nb=4,mask=1,sinks=1", "turbo4", "turbo4"),
    _pair("nh=2,nr23=[2,1],kv=1,nb=1,mask=1", "turbo4", "turbo4"),
    _pair("nh=2,nr23=[2,3],kv=257,nb=70,mask=1", "turbo3", "turbo3"),
    _window("145", "f16", "turbo3", "turbo3"),
    _window("145", "q8_0", "turbo4", "turbo4"),
    _window("177", "q8_0", "turbo3", "turbo3"),
    _window("80", "f16", "turbo4", "turbo3"),
)


def _graph(k: str, v: str, rest: str) -> str:
    """RoPE, rotation, write and attention in one graph, heads of 64."""
    return f"^type_K={k},type_V={v},hs=64,.*{rest}$"


# op → patterns, each of which has to match a case that passes: what `make test` and CI run.
CI = {
    "SET_ROWS": tuple(f"type_src={src},type_dst={turbo}," for src in ("f16", "f32") for turbo in _TURBO),
    "CPY": tuple(
        f"type_src={src},type_dst={dst},"
        for turbo in _TURBO
        for src, dst in (("f32", turbo), (turbo, "f32"), (turbo, turbo))
    ),
    "GET_ROWS": tuple(f"type={turbo}," for turbo in _TURBO),
    "FLASH_ATTN_EXT": _CI_ATTENTION,
    "ROPE_HADAMARD": tuple(f"^type={each}," for each in ("f32", "q8_0", *_TURBO)),
    "FLASH_ATTN_EXT_HADAMARD": (
        _pair("nh=2,nr23=[3,2],kv=1024,nb=1", "q8_0", "turbo3"),
        _pair("nh=2,nr23=[3,2],kv=113,nb=4", "turbo4", "turbo4"),
    ),
    "ATTN_HADAMARD": (
        _graph("turbo3", "turbo3", "n_tokens=1,mode=2"),
        _graph("turbo4", "turbo3", "n_tokens=5,mode=0"),
        _graph("turbo3", "turbo3", "n_tokens=1,mode=2,type_win=f16"),
        _graph("turbo4", "turbo4", "n_tokens=5,mode=0,type_win=q8_0"),
        _graph("turbo3", "turbo3", "n_tokens=1,mode=2,consts=3"),
        _graph("q8_0", "turbo4", "n_tokens=5,mode=0,type_win=q8_0,consts=1"),
    ),
}


def environment(library: Path | None = None) -> dict[str, str]:
    """A device is chosen although it is no GPU; libraries in `library` are taken in place of the build's."""
    env = {"GGML_VK_VISIBLE_DEVICES": "0", **os.environ}
    if library is not None:
        env["LD_LIBRARY_PATH"] = str(library)
    return env


def run(op: str, params: str, *, library: Path | None = None) -> tuple[int, int, str]:
    """(passed, total, output) of the cases of `op` whose parameters match the regex `params`."""
    done = subprocess.run(
        [find_build("vulkan").tool("test-backend-ops"), "test", "-b", "Vulkan0", "-o", op, "-p", params],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=environment(library),
    )
    counts = re.search(r"(\d+)/(\d+) tests passed", done.stdout)
    passed, total = (int(counts[1]), int(counts[2])) if counts else (0, 0)
    if done.returncode != 0 and passed == total:
        total += 1  # it died before it could count the case that killed it
    return passed, total, done.stdout


def missed(output: str, patterns: Iterable[str]) -> list[str]:
    """The patterns of which no case passed."""
    said = re.sub(r"\x1b\[[\d;]*m", "", output)
    passed = re.findall(r"^\s*\w+\((.*)\): OK$", said, re.M)
    return [pattern for pattern in patterns if not any(re.search(pattern, case) for case in passed)]


def refused(output: str) -> list[str]:
    """The cases that the device does not claim."""
    return re.findall(r"^\s*(\w+\(.*\)): not supported", output, re.M)


def main() -> int:
    wrong = False
    lists = {op: (params,) for op, params in (SHORT if "--short" in sys.argv else ALL).items()}
    for op, patterns in (CI if "--ci" in sys.argv else lists).items():
        start, before = time.monotonic(), _cpu_seconds()
        passed, total, output = run(op, "|".join(patterns))
        without = missed(output, patterns)
        if passed < total or without:
            wrong = True
            print("\n".join(line for line in output.splitlines() if "FAIL" in line or "rror" in line))
            print("\n".join(f"no case passed: {pattern}" for pattern in without))
        left, took = len(refused(output)), time.monotonic() - start
        cpu = f"{_cpu_seconds() - before:.0f} s of processor time"
        print(f"{op}: {passed}/{total} passed, {left} not claimed, {took:.0f} s, {cpu}", flush=True)
    return int(wrong)


def _cpu_seconds() -> float:
    """Of the processes so far that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
