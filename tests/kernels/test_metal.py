"""The Metal backend on the emulated device: a reduced list of `make test-metal`, and a sweep."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.support.harness import QUICK, Cli, faulty
from turbo_eval.errors import EnvironmentProblem
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "build/metal-emu"
REWRITE = ROOT / "metal-emu/rewrite.py"

KERNEL = """
#include "common.h"
constant int32_t FC_n [[function_constant(FC_X + 3)]];

template<typename T, short N>
kernel void kernel_scale(
        constant args_t & args,
        device const T * x, // a comment, with [[attribute]]
        device       T * y,
        threadgroup half * shmem [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]]) {
    threadgroup float part[N];
}

template [[host_name("kernel_scale_f32")]] kernel scale_t kernel_scale<float, 4>;

kernel void kernel_plain(device char * x, UNKNOWN) {}
"""


def _tree(tmp_path: Path, kernel: str) -> Path:
    metal = tmp_path / "ggml/src/ggml-metal"
    (metal / "kernels").mkdir(parents=True)
    (metal / "kernels/toy.metal").write_text(kernel)
    for name in ("common.h", "dequantize.h", "quantize.h"):
        (metal / "kernels" / name).write_text("")
    (metal / "ggml-metal-device.m").write_text(
        "#define GGML_METAL_LIBS \\\n    X(TOY, toy)\n\n"
        "static const struct {\n    const char *              name;\n} devices;\n"
        "ggml_metal_device_t ggml_metal_device_init(int device) {}\n"
        "static bool ggml_metal_supports_mul_mat_op(void) { return true; }\n"
        "static void ggml_metal_device_disable_tensor(void) {}\n"
    )
    (metal / "CMakeLists.txt").write_text("set(METALLIB_KERNEL_SOURCES\n    kernels/toy.metal\n)\n")
    return tmp_path


def _rewrite(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REWRITE), str(tree), str(tree / "out")], capture_output=True, text=True
    )


def test_rewriter_turns_attributes_into_tables(tmp_path: Path) -> None:
    tree = _tree(tmp_path, KERNEL.replace(", UNKNOWN", ", uint i [[thread_position_in_grid]]"))
    done = _rewrite(tree)
    assert done.returncode == 0, done.stderr
    text = (tree / "out/kernels/toy.cpp").read_text()
    assert "[[" not in text
    assert 'static emu::fc<int32_t> FC_n{&emu_tu, (FC_X + 3), "FC_n"};' in text
    assert "auto & part = emu::tg_local<float[N]>(" in text
    table = re.search(r"emu_b_kernel_scale\[\] = \{(.*?)\};", text)
    assert table is not None
    kinds = re.findall(r"bind_kind::(\w+), (\d+)", table.group(1))
    assert kinds == [
        ("buffer", "0"),
        ("buffer", "1"),
        ("buffer", "2"),
        ("tgmem", "0"),
        ("threadgroup_position_in_grid", "0"),
        ("thread_index_in_simdgroup", "0"),
    ]
    assert '"kernel_scale_f32", &emu_tu, &emu::thunk<&kernel_scale<float, 4>>::run' in text
    assert '"kernel_plain", &emu_tu' in text


def test_rewriter_stops_at_what_it_does_not_know(tmp_path: Path) -> None:
    tree = _tree(tmp_path, KERNEL.replace(", UNKNOWN", ", uint i [[thread_of_the_day]]"))
    done = _rewrite(tree)
    assert done.returncode == 1
    assert "kernel_plain: parameter attribute [[thread_of_the_day]] is not known" in done.stderr
    assert "Traceback" not in done.stderr


def test_rewriter_wants_every_library_in_both_lists(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "")
    cmake = tree / "ggml/src/ggml-metal/CMakeLists.txt"
    cmake.write_text(cmake.read_text().replace("toy.metal", "toy.metal\n    kernels/other.metal"))
    done = _rewrite(tree)
    assert done.returncode == 1
    assert "GGML_METAL_LIBS and CMakeLists.txt differ in: other" in done.stderr


def test_embedded_libraries_have_their_headers(build: Build) -> None:
    """The Mac build pastes the headers a source itself names before it, and drops every #include."""
    kernels = ROOT / "build/src/ggml/src/ggml-metal/kernels"
    pasted = ("dequantize.h", "quantize.h", "fa_common.metal", "fa_vec_common.metal")

    def named(file: str) -> set[str]:
        return set(re.findall(r'^#include "([\w.]+)"', (kernels / file).read_text(), re.M))

    needs = {header: named(header) & set(pasted) for header in pasted}
    assert needs["quantize.h"] == {"dequantize.h"}
    sources = [f.name for f in kernels.glob("*.metal") if f.name not in pasted]
    assert len(sources) > 30
    for source in sources:
        for header in named(source) & set(pasted):
            assert needs[header] <= named(source), f"{source} names {header} but not {needs[header]}"


@pytest.fixture(scope="module")
def emulator() -> Path:
    """The library of the emulated device, which `make test` builds where there is a compiler for it."""
    if sys.platform != "linux":
        pytest.skip("the emulated Metal device needs Linux")
    library = EMULATOR / "libggml-metal-emu.so"
    if not library.exists():
        absent(EnvironmentProblem("the emulated Metal device is not built", "run `make metal-emu`"))
    return library


def _run_tests(step: str, build: Build, *more: str) -> str:
    """One step of `make test-metal`'s reduced list; what it printed."""
    argv = [sys.executable, str(ROOT / "metal-emu/run_tests.py"), "--quick", "--only", step, *more]
    argv += ["--src", str(ROOT / "build/src"), "--bin", str(build.bin_dir), "--out", str(EMULATOR)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.metal
def test_whatever_is_accepted_has_a_kernel(emulator: Path, build: Build) -> None:
    out = _run_tests("crosscheck", build)
    print(out)


@pytest.mark.metal
def test_pairs_in_every_lane_order_and_gpu_family(emulator: Path, build: Build) -> None:
    out = _run_tests("pairs", build)
    passed = {op: int(n) for op, n in re.findall(r"^ok   pairs (\S+): (\d+) passed, 0 failed", out, re.M)}
    # 14 pairs of f16, q8_0, turbo3 and turbo4
    assert passed["FLASH_ATTN_EXT"] >= 14 * 18
    # all 16 pairs of them with a window, in f16 and in q8_0
    assert passed["FLASH_ATTN_EXT_WINDOW"] >= 16 * 12
    assert passed["SET_ROWS"] >= 16
    assert passed["rotation"] == 6


@pytest.mark.metal
def test_attention_sinks_follow_the_anchor_on_the_device(emulator: Path, build: Build) -> None:
    """A small gpt-oss with a large K bias: cache types, K anchor and window against a cache of F32."""
    assert "10 cases of 1 architectures" in _run_tests("archs", build)


@pytest.mark.metal
def test_llama_cpps_own_cases_pass(emulator: Path, build: Build) -> None:
    """SET_ROWS, CPY, GET_ROWS, CONCAT, flash attention with turbo types, also beside a window."""
    out = _run_tests("ops", build)
    window = re.search(r"^ok   test-backend-ops FLASH_ATTN_EXT: (\d+)/\1 tests passed win=", out, re.M)
    assert window is not None, out
    assert int(window[1]) >= 14


@pytest.mark.metal
def test_planted_faults_are_caught(emulator: Path, build: Build) -> None:
    out = _run_tests("controls", build)
    assert len(re.findall(r"^ok   control: .*: caught: ", out, re.M)) >= 9


@pytest.mark.metal
def test_whole_model_equals_the_cpu(
    emulator: Path, build: Build, smollm: ModelFile, prose: CorpusFile
) -> None:
    out = _run_tests("model", build, "--model", str(smollm.path), "--text", str(prose.path))
    print(out)


@pytest.mark.metal
def test_sweep_on_the_device_records_its_family(
    emulator: Path, build: Build, smollm: ModelFile, prose: CorpusFile, tmp_path: Path
) -> None:
    """As on a Mac: the build has a Metal library, the layers go to the GPU, the log names its family."""
    # an ordinary CPU build loads the device when it is asked for by name
    bin_dir = faulty(tmp_path / "bin", build.bin_dir, 'set -- "$@" -dev MTL0')
    shutil.copy(emulator, bin_dir / emulator.name)
    cli = Cli(tmp_path / "results", bin_dir)
    args = (
        "--model",
        smollm.path,
        "--corpus",
        prose.path,
        "--pairs",
        "turbo4:turbo4",
        "--no-reference",
        *QUICK,
    )
    done = cli.sweep(
        *args, "--metrics", "ppl", "--backend", "metal", env={"GGML_BACKEND_PATH": str(emulator)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = cli.records()
    assert record["cell"]["backend"] == "metal"
    effective = record["effective"]
    assert effective["gpu"] == ["GPU family: MTLGPUFamilyApple9  (1009)"]
    assert effective["kv_devices"] == ["MTL0"]
    assert effective["layers_offloaded"] == effective["layers"]
