"""Instructions per cached value of the Metal kernels that read and write a KV cache: `make cost` here.

    cost.py SRC GEN CLANG

SRC is the llama.cpp tree, GEN the folder that rewrite.py filled, CLANG a clang++ >= 16 with the AMDGPU
target. Apple publishes no instruction set, so the lanes' code in cost.cpp is compiled for AMD's gfx1030, a
GPU with a scalar instruction stream per lane, loops unrolled; counted are vector instructions, address
arithmetic included, and loads. `work` is over all lanes, a cached value; `row` is how many instructions one
lane executes one after the other. It orders the types; it is no estimate of speed. Scalar instructions are
not counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from turbo_eval.formats.cache_types import cache_type

HERE = Path(__file__).resolve().parent
FLAGS = [
    *("--target=amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-ffreestanding"),
    *("-std=c++17", "-O3", "-w", "-S", "-Xclang", "-cl-single-precision-constant", "-DGGML_METAL_HAS_BF16"),
    *("-mllvm", "-unroll-threshold=1000000", "-mllvm", "-unroll-max-percent-threshold-boost=1000"),
    *("-mllvm", "-inline-threshold=1000000"),
]
LANES = {"encode_simd": 32}  # that share a function's values


def count(assembly: str) -> list[tuple[str, str, str, float, float, int]]:
    """Of every function of cost.cpp: kernel, type, variant, work and loads a value, instructions in a row."""
    rows = []
    function = r"^(\w+?)__(\w+?)__(\d+)(?:__(\w+))?:\s.*?\n(.*?)s_setpc_b64"
    for m in re.finditer(function, assembly, re.S | re.M):
        kernel, name, values, variant, body = m.groups()
        for jump in re.finditer(r"\ts_c?branch\w* (\S+)", body):
            if 0 <= body.find(f"{jump[1]}:") < jump.start():
                sys.exit(f"cost: {kernel} {name} has a loop, its instructions cannot be counted")
        if "s_swappc" in body:
            sys.exit(f"cost: {kernel} {name} calls a function, its instructions cannot be counted")
        lines = [line.split()[0] for line in body.splitlines() if re.match(r"\t[a-z]", line)]
        vector = sum(op.startswith("v_") for op in lines)
        loads = sum("load" in op for op in lines)
        share = LANES.get(kernel, 1) / int(values)
        rows.append((kernel, name, variant or "", vector * share, loads * share, vector))
    return rows


def main() -> int:
    """Command line: see the module's docstring."""
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    src, gen, clang = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as tmp:
        # the host's headers don't fit the target, and one function is all that is used of them
        header = 'extern "C" void * memcpy(void *, const void *, size_t);\n'
        (Path(tmp) / "string.h").write_text(header)
        out = Path(tmp) / "cost.s"
        metal = src / "ggml/src/ggml-metal"
        include = [tmp, HERE / "include", HERE / "include/shim", gen / "kernels", metal, src / "ggml/src"]
        argv = [clang, *FLAGS, *(f"-I{p}" for p in include), "-include", str(HERE / "include/emu_metal.h")]
        done = subprocess.run([*argv, str(HERE / "cost.cpp"), "-o", str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
        rows = count(out.read_text())
    print(f"{'kernel':12} {'type':8} {'codebook':10} {'bytes':>6} {'work':>7} {'loads':>6} {'row':>5}")
    for kernel, name, variant, work, loads, row in rows:
        width = cache_type(name).bpv / 8
        print(f"{kernel:12} {name:8} {variant:10} {width:6.3f} {work:7.1f} {loads:6.2f} {row:5}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
