"""The self-test passes on the real build, and each fault put into its libraries fails the right line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from turbo_eval.formats import packing
from turbo_eval.formats.cache_types import BOOKS
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.selftest import Selftest
from turbo_eval.selftest.checks import all_checks
from turbo_eval.util import paths


@pytest.fixture(scope="module")
def turbo_build(build: Build) -> Build:
    if not {"turbo3", "turbo4"} <= capabilities(build).cache_types:
        pytest.skip("the build has no turbo types")
    return build


def failing(build: Build, names: list[str] | None = None) -> dict[str, str]:
    return {line.name: line.detail for line in Selftest(build, "cpu").run(names) if not line.ok}


@pytest.mark.build
def test_the_build_passes(turbo_build: Build) -> None:
    lines = list(Selftest(turbo_build, "cpu").run())
    assert [line.name for line in lines] == list(all_checks())
    assert [line for line in lines if line.ok is not True] == []
    assert sum(line.name.startswith("attention ") for line in lines) == 121
    assert sum(line.name.startswith("window ") for line in lines) == 1 + 112


@pytest.mark.parametrize("name", ["turbo3", "turbo4"])
def test_the_reference_layout_reads_what_it_writes(name: str) -> None:
    scale, codes = packing.every_code_everywhere(name)
    read_scale, read = packing.unpack(name, packing.pack(name, scale, codes))
    assert np.array_equal(scale, read_scale)
    assert np.array_equal(codes, read)
    n = 2 * len(BOOKS[name].magnitudes)
    for position in range(packing.BLOCK):
        assert set(codes[:, position]) == set(range(n))


PRELUDE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "ggml.h"
"""
# Each replaces one function of the real libraries, as a broken kernel would.
DEQUANTIZE = """
void dequantize_row_turbo4(const void * x, float * y, int64_t k) {
    static const float mag[8] = { 6, 18, 31, 45, 60, 77, 98, LAST };
    for (const uint8_t * b = x; k > 0; k -= 64, b += 34, y += 64) {
        for (int i = 0; i < 64; ++i) {
            const int s = b[i / 32];
            const float scale = s < 16 ? s * 0x1p-17f : ldexpf(16 + s % 16, s / 16 - 18);
            const int code = b[2 + 16 * (i / 32) + i % 16] >> (i / 16 % 2 == HIGH ? 4 : 0) & 15;
            y[i] = scale * (code & 8 ? -mag[code & 7] : mag[code & 7]);
        }
    }
}
"""
SWAP_WRITTEN = """
void quantize_row_turbo4(const float * x, void * y, int64_t k) {
    void (*real)(const float *, void *, int64_t) = dlsym(RTLD_NEXT, "quantize_row_turbo4");
    real(x, y, k);
    for (uint8_t * b = y; k > 0; k -= 64, b += 34) {
        for (int j = 2; j < 34; ++j) {
            b[j] = b[j] << 4 | b[j] >> 4;
        }
    }
}
"""
ROTATION_128 = """
void ggml_compute_forward_fwht(const void * params, struct ggml_tensor * dst) {
    const int * ith = params; // the first member
    const int64_t n = 128, total = ggml_nelements(dst);
    float * y = dst->data;
    if (*ith != 0) {
        return;
    }
    memcpy(y, dst->src[1]->data, total * sizeof(float));
    for (int64_t row = 0; row + n <= total; row += n) {
        for (int64_t len = 1; len < n; len *= 2) {
            for (int64_t i = 0; i < n; ++i) {
                if (!(i & len)) {
                    const float u = y[row + i], v = y[row + i + len];
                    y[row + i] = u + v;
                    y[row + i + len] = u - v;
                }
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            y[row + i] /= sqrtf(n);
        }
    }
}
"""
IS_PAIR = """
static int is_pair(const struct ggml_tensor * op) {
    const char * k = ggml_get_type_traits(op->src[1]->type)->type_name;
    const char * v = ggml_get_type_traits(op->src[2]->type)->type_name;
    return !strcmp(k, "q8_0") && !strcmp(v, "turbo4");
}
"""
UNSUPPORTED = """
bool ggml_backend_dev_supports_op(void * device, const struct ggml_tensor * op) {
    bool (*real)(void *, const struct ggml_tensor *) = dlsym(RTLD_NEXT, "ggml_backend_dev_supports_op");
    return !(op->op == GGML_OP_FLASH_ATTN_EXT && is_pair(op)) && real(device, op);
}
"""
DISPATCH = """
void ggml_compute_forward_flash_attn_ext(const void * params, struct ggml_tensor * dst) {
    void (*real)(const void *, struct ggml_tensor *) = dlsym(RTLD_NEXT, __func__);
    if (is_pair(dst)) {
        INSTEAD;
    }
    real(params, dst);
}
"""
WINDOW = ["attention turbo4:turbo4", "window partition", "window turbo4:turbo4"]
# the second segment is forgotten
DROP_WINDOW = """
void ggml_compute_forward_flash_attn_ext(const void * params, struct ggml_tensor * dst) {
    void (*real)(const void *, struct ggml_tensor *) = dlsym(RTLD_NEXT, __func__);
    struct ggml_tensor alone = *dst;
    alone.src[5] = alone.src[6] = alone.src[7] = NULL;
    real(params, &alone);
}
"""
ATTENTION = ["attention q8_0:q8_0", "attention q8_0:turbo4", "attention turbo4:turbo4"]


@pytest.mark.build
@pytest.mark.skipif(sys.platform != "linux", reason="puts the faults in with LD_PRELOAD")
@pytest.mark.parametrize(
    ("fault", "flags", "checks", "expected"),
    [
        pytest.param(
            DEQUANTIZE,
            ("-DLAST=127*0.8f", "-DHIGH=1"),
            ["codebook turbo3", "codebook turbo4", "scales turbo4"],
            {"codebook turbo4": "level 7 is 101.6, by definition 127 (-20 %)"},
            id="centroid",
        ),
        pytest.param(
            DEQUANTIZE,
            ("-DLAST=127", "-DHIGH=0"),
            ["codebook turbo4", "scales turbo4", "unpack turbo4", "unpack turbo3"],
            {"unpack turbo4": "it holds what belongs to position 16"},
            id="swapped nibbles, read",
        ),
        pytest.param(
            SWAP_WRITTEN,
            (),
            ["pack turbo4", "cache write turbo4", "cache write turbo3"],
            {"cache write turbo4": "there stands the code of position 16"},
            id="swapped nibbles, written",
        ),
        pytest.param(
            ROTATION_128,
            (),
            ["rotation 64", "rotation 128", "rotation 256"],
            {"rotation 64": "groups of 128 instead of 64", "rotation 256": "groups of 128 instead of 256"},
            id="rotation of 128",
        ),
        pytest.param(
            IS_PAIR + UNSUPPORTED,
            (),
            ATTENTION,
            {"attention q8_0:turbo4": "has no kernel for it"},
            id="missing pair, known",
        ),
        pytest.param(
            IS_PAIR + DISPATCH,
            ("-DINSTEAD=return",),
            ATTENTION,
            {"attention q8_0:turbo4": "100 % of the output is NaN or was never written"},
            id="missing pair, silent",
        ),
        pytest.param(
            IS_PAIR + DISPATCH,
            ("-DINSTEAD=__builtin_trap()",),
            ATTENTION,
            {"attention q8_0:turbo4": "it crashed (SIG"},
            id="missing pair, abort",
        ),
        pytest.param(
            DROP_WINDOW,
            (),
            WINDOW,
            {"window turbo4:turbo4": "against the reference, limit 0.001 (window 128+4 in f16, 1 query)"},
            id="window forgotten",
        ),
    ],
)
def test_a_fault_fails_its_line_and_no_other(
    turbo_build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    flags: tuple[str, ...],
    checks: list[str],
    expected: dict[str, str],
) -> None:
    headers = next(
        (
            place / "ggml" / "include"
            for place in (turbo_build.bin_dir.parent.parent, paths.worktree_dir())
            if (place / "ggml" / "include" / "ggml.h").is_file()
        ),
        None,
    )
    if headers is None:
        pytest.skip("ggml's headers are not here")
    source, library = tmp_path / "fault.c", tmp_path / "fault.so"
    source.write_text(PRELUDE + fault)
    command = ["cc", "-O1", "-shared", "-fPIC", f"-I{headers}", *flags, str(source), "-o", str(library)]
    subprocess.run([*command, "-lm", "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    found = failing(turbo_build, checks)
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name]


@pytest.mark.build
@pytest.mark.skipif(sys.platform != "linux", reason="puts the fault in with LD_PRELOAD")
def test_a_window_that_reaches_one_key_further(
    turbo_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's own source, its rule off by one: the partition is red, attention itself is not."""
    sources = next(
        (
            place
            for place in (turbo_build.bin_dir.parent.parent / "src", paths.worktree_dir())
            if (place / "src" / "llama-kv-window.h").is_file()
        ),
        None,
    )
    if sources is None:
        pytest.skip("the source of the exact window is not here")
    for name in ("llama-kv-window.h", "llama-kv-window.cpp"):
        text = (sources / "src" / name).read_text()
        if name.endswith(".h"):
            assert text.count("p_query - p_key < (int64_t) params.n_recent") == 1
            text = text.replace("p_query - p_key < (int64_t)", "p_query - p_key <= (int64_t)")
        (tmp_path / name).write_text(text)
    include = [f"-I{tmp_path}", *(f"-I{sources / part}" for part in ("src", "include", "ggml/include"))]
    library = tmp_path / "fault.so"
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        *include,
        str(tmp_path / "llama-kv-window.cpp"),
    ]
    subprocess.run([*command, "-o", str(library)], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    found = failing(turbo_build, WINDOW)
    assert found.keys() == {"window partition"}
    assert "is exact for a query at" in found["window partition"]


@pytest.mark.build
def test_a_type_that_the_build_lacks_is_a_line_and_no_read_past_the_table(turbo_build: Build) -> None:
    """In a process of its own: the search for a type that isn't there ran on into other memory."""
    code = (
        "import sys; from pathlib import Path\n"
        "from turbo_eval.formats.cache_types import CACHE_TYPES, CacheType\n"
        "CACHE_TYPES['own9'] = CacheType('own9', 32, 20)\n"
        "from turbo_eval.selftest.checks import run_checks\n"
        "from turbo_eval.selftest.ggml import Ggml\n"
        "ggml = Ggml(Path(sys.argv[1]), 'cpu')\n"
        "print(*(r.detail for _, r in run_checks(ggml, ['attention own9:q8_0']) if r))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(turbo_build.bin_dir)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "this build does not have the type own9"), (
        done.stderr
    )
