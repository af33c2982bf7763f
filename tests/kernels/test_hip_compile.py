"""The CUDA sources that the series touches, compiled for AMD GPUs with clang and Debian's HIP headers.

gfx90a has warps (wavefronts) of 64 threads, gfx1100 of 32. Nothing of it was run: docs/explanation/cuda.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from turbo_eval.util import paths

ARCHS = ("gfx90a", "gfx1100")
REPO = Path(__file__).parents[2]
OWN_HEADERS = Path(__file__).parent / "hip"
INSTANCES = "template-instances/fattn-mma-q-instance-"  # all of one kind: a few stand for them
SOME_INSTANCES = (f"{INSTANCES}turbo3-turbo4.cu", f"{INSTANCES}turbo4-turbo2.cu", f"{INSTANCES}f16-q8_0.cu")
PARSED = {"fattn.cu", "mmvq.cu"}  # upstream's kernels in them take 13 and 30 s to compile
_TOUCHED = re.compile(r"^diff --git a/ggml/src/ggml-cuda/(\S+\.cu) ", re.M)
NVIDIA_ONLY = "sm90a/"  # not among the sources of ggml-hip
# What CMake sets by default for this backend.
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")
COMPILED = {(t, t) for t in ("Q4_0", "Q8_0", "BF16", "F16")}
DEFINES = (
    *("GGML_USE_HIP", "GGML_HIP_NO_VMM", "GGML_HIP_GRAPHS", "__HIP_PLATFORM_AMD__"),
    *(f"GGML_CUDA_FA_{k}_{v}={int((k, v) in COMPILED)}" for k, v in product(TYPES, TYPES)),
)


def touched() -> list[str]:
    """Sources of ggml-hip in the patches, of the many template instances SOME_INSTANCES."""
    texts = [p.read_text(encoding="utf-8") for p in (REPO / "patches").glob("*.patch")]
    found = {name for text in texts for name in _TOUCHED.findall(text)}
    assert found.issuperset(SOME_INSTANCES)
    found = {name for name in found if not name.startswith(NVIDIA_ONLY)}
    return sorted(name for name in found if name in SOME_INSTANCES or not name.startswith(INSTANCES))


@pytest.fixture(scope="module")
def source() -> Path:
    """ggml-cuda of the patched llama.cpp, or of the tree that TURBO_EVAL_TEST_SRC names."""
    tree = Path(os.environ.get("TURBO_EVAL_TEST_SRC", paths.worktree_dir()))
    found = tree / "ggml/src/ggml-cuda"
    if not (found / "fattn-mma-q.cuh").is_file():
        pytest.skip(f"{tree} has no fattn-mma-q.cuh: run turbo-eval patches apply")
    return found


@pytest.fixture(scope="module")
def rocm() -> Path:
    """Debian's HIP headers, unpacked by .ci/run or installed."""
    for place in (REPO / "build/hip-headers/usr", Path("/usr"), Path("/opt/rocm")):
        if (place / "include/hip/hip_version.h").is_file():
            return place
    pytest.skip("there are no HIP headers: install libamdhip64-dev, or run .ci/run")


@pytest.fixture(scope="module")
def clang() -> str:
    names = ("clang-19", "clang-20", "clang-21", "clang-18", "clang-17")
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    return found


def compile_for(arch: str, name: str, source: Path, rocm: Path, clang: str, out: Path) -> str:
    """The assembly of the device code; "" of what is only parsed."""
    includes = (OWN_HEADERS, source.parent, source.parents[1] / "include", source)
    done = subprocess.run(
        [
            *(clang, "-x", "hip", f"--offload-arch={arch}", "--cuda-device-only", "-O3", "-std=c++17"),
            *(("-fsyntax-only",) if name in PARSED else ("-S", "-o", str(out))),
            *(f"--rocm-path={rocm}", "-nogpulib"),
            *(f"-D{define}" for define in DEFINES),
            *(f"-I{folder}" for folder in includes),
            str(source / name),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return "" if name in PARSED else out.read_text()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", touched())
def test_compiles(name: str, arch: str, source: Path, rocm: Path, clang: str, tmp_path: Path) -> None:
    text = compile_for(arch, name, source, rocm, clang, tmp_path / "out.s")
    assert name in PARSED or f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"' in text


@pytest.mark.parametrize("arch", ARCHS)
def test_the_encoder_rounds_as_the_reference(
    arch: str, source: Path, rocm: Path, clang: str, tmp_path: Path
) -> None:
    """A product and a sum that are contracted to one instruction would give other codes. The only ones are
    those of a division (5) and of a square root (2)."""
    text = compile_for(arch, "set-rows.cu", source, rocm, clang, tmp_path / "out.s")
    kernels = re.findall(r"^(_ZL16k_set_rows_turbo\w+):(.*?)s_endpgm", text, re.M | re.S)
    assert len(kernels) == 6, "3 types, 2 types of indices"
    for name, body in kernels:
        divisions, roots = body.count("v_div_fmas_f32"), body.count("v_sqrt_f32")
        contracted = re.findall(r"^\s+(v_(?:pk_)?(?:fma|fmac|mad|mac)_f32\w*)", body, re.M)
        assert divisions > 0 and roots > 0
        assert len(contracted) == 5 * divisions + 2 * roots, name
