"""The NEON kernels, cross-compiled for aarch64 and run under qemu's user mode.

Compared with ggml's own reference path by fattn_compare.cpp, and by llama.cpp's test-quantize-fns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from turbo_eval.util import paths

COMPARE = Path(__file__).with_name("fattn_compare.cpp")
PREFIX = "aarch64-linux-gnu-"
DEBIAN_PACKAGES = {
    f"{PREFIX}gcc": "gcc-aarch64-linux-gnu",
    f"{PREFIX}g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "ninja": "ninja-build",
}

LLAMA_PARTS = ("APP", "COMMON", "EXAMPLES", "SERVER", "TESTS", "TOOLS")


@dataclass(frozen=True)
class Target:
    """One instruction set: what the compiler may use and the processor that qemu plays."""

    name: str
    march: str
    cpu: str
    dotprod: bool


TARGETS = [
    Target("dotprod", "armv8.2-a+dotprod+fp16", "max", dotprod=True),
    Target("plain", "armv8-a", "cortex-a53", dotprod=False),
]


def find_qemu() -> str:
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("qemu-aarch64 is not installed: apt-get install qemu-user-static")


def find_source() -> Path:
    """The patched llama.cpp, or the tree that TURBO_EVAL_TEST_SRC names."""
    source = Path(os.environ.get("TURBO_EVAL_TEST_SRC", paths.worktree_dir()))
    if not (source / "ggml/src/ggml-cpu/fattn-quant.cpp").is_file():
        pytest.skip(f"{source} has no fattn-quant.cpp: run turbo-eval patches apply")
    return source


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@dataclass(frozen=True)
class CrossBuild:
    """A static aarch64 build of ggml."""

    target: Target
    source: Path
    build: Path
    qemu: str

    def program(self, file: Path) -> Path:
        """Compile one C++ file against the build."""
        libraries = [self.build / "ggml/src" / f"libggml-{part}.a" for part in ("cpu", "base")]
        out = self.build / file.stem
        include = self.source / "ggml/include"
        flags: list[str | Path] = [
            "-O1",
            "-std=c++17",
            "-static",
            f"-march={self.target.march}",
            "-I",
            include,
            "-o",
            out,
        ]
        run(f"{PREFIX}g++", *flags, file, *libraries, "-lpthread", "-ldl")
        return out

    def emulate(self, program: Path) -> str:
        return run(self.qemu, "-cpu", self.target.cpu, program)


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def cross(request: pytest.FixtureRequest) -> CrossBuild:
    for tool, package in DEBIAN_PACKAGES.items():
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {package}")
    qemu = find_qemu()
    source = find_source()
    target: Target = request.param
    build = paths.build_dir(f"neon-{target.name}")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{PREFIX}gcc",
        "CMAKE_CXX_COMPILER": f"{PREFIX}g++",
        "GGML_NATIVE": "OFF",
        "GGML_OPENMP": "OFF",
        "GGML_CPU_ARM_ARCH": target.march,
        "BUILD_SHARED_LIBS": "OFF",
        **{f"LLAMA_BUILD_{part}": "OFF" for part in LLAMA_PARTS},
    }
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *definitions)
    run("cmake", "--build", build, "--target", "ggml-base", "ggml-cpu")
    return CrossBuild(target, source, build, qemu)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_attention_equals_the_reference(cross: CrossBuild) -> None:
    said = cross.emulate(cross.program(COMPARE)).splitlines()
    assert said[0].startswith(f"neon 1 dotprod {int(cross.target.dotprod)}")
    assert said[-1] == "144 pairs, 4242 cases, 0 bad"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quantize_fns(cross: CrossBuild) -> None:
    cross.emulate(cross.program(cross.source / "tests/test-quantize-fns.cpp"))
