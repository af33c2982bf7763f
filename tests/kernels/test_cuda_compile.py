"""The CUDA sources of the patch, without a GPU: they compile, and the template instances are the generator's.

What runs on a GPU, and what it gave, is in docs/explanation/cuda.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_eval.util import paths

ARCH = "90"
# Instances of the attention kernel that hold all our types, its host side, encoder, rotations.
FILES = (
    "template-instances/fattn-mma-q-instance-turbo3-turbo4.cu",
    "template-instances/fattn-mma-q-instance-turbo4-turbo2.cu",
    "fattn-mma-q.cu",
    "set-rows.cu",
    "fwht.cu",
    "rope.cu",
    "sm90a/fattn-wgmma.cu",
)
FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda")
PROBE = "#include <cublas_v2.h>\n"


@pytest.fixture
def source() -> Path:
    """ggml-cuda of the patched llama.cpp, or of the tree that TURBO_EVAL_TEST_SRC names."""
    tree = Path(os.environ.get("TURBO_EVAL_TEST_SRC", paths.worktree_dir()))
    found = tree / "ggml/src/ggml-cuda"
    if not (found / "fattn-mma-q.cuh").is_file():
        pytest.skip(f"{tree} has no fattn-mma-q.cuh: run turbo-eval patches apply")
    return found


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc is not installed: the CUDA toolkit has it")
    probe = tmp_path / "probe.cu"
    probe.write_text(PROBE)
    done = subprocess.run([found, "-E", str(probe)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("nvcc finds no cublas_v2.h, which ggml-cuda includes: name its folder in CPATH")
    return found


@pytest.mark.parametrize("name", FILES)
def test_compiles(name: str, source: Path, nvcc: str, tmp_path: Path) -> None:
    arch = f"{ARCH}a" if name.startswith("sm90a/") else ARCH
    done = subprocess.run(
        [
            nvcc,
            *FLAGS,
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            *(["-DGGML_CUDA_SM90A"] if arch != ARCH else []),
            f"-I{source.parent}",
            f"-I{source.parents[1] / 'include'}",
            f"-I{source}",
            "-c",
            str(source / name),
            "-o",
            str(tmp_path / "out.o"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (tmp_path / "out.o").stat().st_size > 0


def test_template_instances_are_the_generators(source: Path, tmp_path: Path) -> None:
    committed = source / "template-instances"
    again = tmp_path / "template-instances"
    again.mkdir()
    shutil.copy(committed / "generate_cu_files.py", again)
    subprocess.run([sys.executable, "generate_cu_files.py"], cwd=again, check=True)

    def texts(folder: Path) -> dict[str, str]:
        return {file.name: file.read_text() for file in folder.glob("*.cu")}

    made = texts(again)
    assert "fattn-mma-q-instance-turbo3-turbo4.cu" in made
    assert made == texts(committed)
