"""The CPU's flash attention against double precision: `fattn_compare.cpp` with the CPU build's ggml.

All 121 pairs take minutes; `test_neon.py` runs them for another instruction set. Here one type of each
kind, alone and beside a window.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from turbo_eval.llama.build import Build
from turbo_eval.util import paths

COMPARE = Path(__file__).with_name("fattn_compare.cpp")
TYPES = ("f16", "q8_0", "q4_1", "turbo3", "turbo4")


def test_attention_equals_double_precision(build: Build, tmp_path: Path) -> None:
    program = tmp_path / "fattn_compare"
    include = paths.worktree_dir() / "ggml" / "include"
    libraries = ["-L", build.bin_dir, "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{build.bin_dir}"]
    compile_ = ["c++", "-O2", "-std=c++17", "-I", include, "-o", program, COMPARE, *libraries]
    subprocess.run([str(word) for word in compile_], check=True)
    # a failed assertion of ggml may hang in its backtrace
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([program, *TYPES], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.splitlines()[-1] == "25 pairs, 726 cases, 0 bad"
