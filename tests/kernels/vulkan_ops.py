"""Run test-backend-ops on a Vulkan device against the CPU: `python -m tests.kernels.vulkan_ops`.

The device is the one that GGML_VK_VISIBLE_DEVICES names, else the machine's first, which is llvmpipe where
there is no GPU. Exit 1 when a case fails or none ran.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from turbo_eval.llama.build import find_build

# op → the cases of it that the patches touch
ALL = {
    "SET_ROWS": "turbo[234]",
    "CPY": "turbo[234]",
    "GET_ROWS": "turbo[234]",
    "FLASH_ATTN_EXT": "turbo[234]|win=|type_K=bf16,type_V=(f16|q)|type_K=(f16|q.*),type_V=bf16",
}
# What llvmpipe does in minutes. It compiles an attention pipeline in seconds with heads of 64; with heads of
# 128 in most of a minute with Mesa 22.3 and LLVM 15, in three seconds with Mesa 25 and LLVM 19.
_SHORT_WINDOW = "win=(145|177|48|656),type_win=f16,type_K=turbo3,type_V=turbo3,hsk=64"
SHORT = ALL | {
    "FLASH_ATTN_EXT": f"^hsk=64,.*type_K=turbo3,type_V=turbo3.*n_kv_max=0$|{_SHORT_WINDOW}",
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


def refused(output: str) -> list[str]:
    """The cases that the device does not claim."""
    return re.findall(r"^\s*(\w+\(.*\)): not supported", output, re.M)


def main() -> int:
    wrong = False
    for op, params in (SHORT if "--short" in sys.argv else ALL).items():
        start = time.monotonic()
        passed, total, output = run(op, params)
        if passed < total or total == 0:
            wrong = True
            print("\n".join(line for line in output.splitlines() if "FAIL" in line or "rror" in line))
        left, took = len(refused(output)), time.monotonic() - start
        print(f"{op}: {passed}/{total} passed, {left} not claimed, {took:.0f} s", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
