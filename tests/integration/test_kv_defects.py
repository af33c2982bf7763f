"""Faults of the patches that were mended once: refusals, the anchor of every context, memory, Ctrl-C.

llama.cpp's own tools on a real model. What no device here would say or do, a small preloaded library does.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from tests.support.llama_server import LlamaServer, started
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.util import paths
from turbo_eval.util.process import child_environment

pytestmark = pytest.mark.build

# Says on stderr what libllama asks a device about attention, which graphs are split among devices, and that
# exit handlers ran. NO_KERNEL=one, batch or write: the device has no kernel for attention of one token, of a
# batch, or for writing the cache. OFFLOADED: the scheduler has moved all attention to another device.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ggml-backend.h"

static bool lacks(const char * what) {
    const char * no = getenv("NO_KERNEL");
    return no && strcmp(no, what) == 0;
}

bool ggml_backend_dev_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op) {
    bool (*real)(ggml_backend_dev_t, const struct ggml_tensor *) =
        dlsym(RTLD_NEXT, "ggml_backend_dev_supports_op");
    Dl_info from = {0};
    dladdr(__builtin_return_address(0), &from);
    if (from.dli_fname && strstr(from.dli_fname, "libllama.so")) {
        if (op->op == GGML_OP_SET_ROWS && lacks("write")) {
            return false;
        }
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            const bool one = op->src[0]->ne[1] == 1;
            fprintf(stderr, "asked: %s\n", one ? "one" : "batch");
            if (lacks(one ? "one" : "batch")) {
                return false;
            }
        }
    }
    return real(device, op);
}

// memory of the CPU has no device, that of others has
ggml_backend_dev_t ggml_backend_buft_get_device(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t (*real)(ggml_backend_buffer_type_t) = dlsym(RTLD_NEXT, "ggml_backend_buft_get_device");
    return lacks("write") ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) : real(type);
}

void ggml_backend_sched_split_graph(ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    void (*real)(ggml_backend_sched_t, struct ggml_cgraph *) =
        dlsym(RTLD_NEXT, "ggml_backend_sched_split_graph");
    fprintf(stderr, "split\n");
    real(sched, graph);
}

ggml_backend_t ggml_backend_sched_get_tensor_backend(ggml_backend_sched_t sched, struct ggml_tensor * node) {
    ggml_backend_t (*real)(ggml_backend_sched_t, struct ggml_tensor *) =
        dlsym(RTLD_NEXT, "ggml_backend_sched_get_tensor_backend");
    return getenv("OFFLOADED") && node->op == GGML_OP_FLASH_ATTN_EXT ? NULL : real(sched, node);
}

__attribute__((constructor)) static void begin(void) {
    setvbuf(stdout, NULL, _IOLBF, 0); // so that a log in a file can be waited for
}

__attribute__((destructor)) static void end(void) {
    fprintf(stderr, "exit handlers ran\n");
}
"""
TEXT = "The ship left the harbour before dawn, and nobody on the quay could say where it would be. "


class Tools:
    """Runs a tool of the build on one model, with Flash Attention unless options say otherwise."""

    def __init__(self, build: Build, model: Path) -> None:
        self.build, self.model = build, model

    def argv(self, name: str, *options: str) -> list[str]:
        attention = () if "-fa" in options else ("-fa", "on")
        return [str(self.build.tool(name)), "-m", str(self.model), "-t", "1", *attention, *options]

    def run(self, name: str, *options: str, shim: Path | None = None, code: int = 0, **env: str) -> str:
        """What it printed; it must end with that code."""
        if shim:
            env["LD_PRELOAD"] = str(shim)
        done = subprocess.run(
            self.argv(name, *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=child_environment()[0] | env,
            timeout=300,
        )
        assert done.returncode == code, f"{done.returncode}: {done.stdout[-3000:]}"
        return done.stdout

    def complete(
        self, *options: str, fit: str = "off", shim: Path | None = None, code: int = 0, **env: str
    ) -> str:
        base = ("-p", "Hello", "-n", "1", "-c", "256", "-no-cnv", "--no-warmup", "-fit", fit)
        return self.run("llama-completion", *base, *options, shim=shim, code=code, **env)


@pytest.fixture(scope="module")
def tools(build: Build, smollm: ModelFile) -> Tools:
    return Tools(build, smollm.path)


@pytest.fixture(scope="module")
def shim(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("puts the faults in with LD_PRELOAD")
    headers = [place / "ggml" / "include" for place in (build.bin_dir.parent.parent, paths.worktree_dir())]
    found = next((place for place in headers if (place / "ggml.h").is_file()), None)
    if found is None:
        pytest.skip("ggml's headers are not here")
    source = tmp_path_factory.mktemp("shim") / "shim.c"
    source.write_text(SHIM)
    library = source.with_suffix(".so")
    command = ["cc", "-O1", "-shared", "-fPIC", f"-I{found}", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def cache(k: str, v: str | None = None) -> tuple[str, ...]:
    return ("-ctk", k, "-ctv", v or k)


# -- pairs that the cache's device has no kernel for --------------------------------------------------


@pytest.mark.parametrize(("lacks", "when"), [("one", "for one token"), ("batch", "for a batch of tokens")])
def test_a_pair_without_kernel_is_refused_by_name(tools: Tools, shim: Path, lacks: str, when: str) -> None:
    said = tools.complete(*cache("q8_0", "turbo4"), "-lv", "4", shim=shim, code=1, NO_KERNEL=lacks)
    assert (
        "CPU has no Flash Attention kernel for a KV cache with K type q8_0 and V type turbo4 and head size "
        f"64 (layer 0), {when}: use another pair of types or --no-kv-offload" in said
    )


def test_a_type_that_the_device_cannot_write_is_refused_by_name(tools: Tools, shim: Path) -> None:
    said = tools.complete(*cache("turbo3"), "-lv", "4", shim=shim, code=1, NO_KERNEL="write")
    assert "CPU has no kernel that writes a KV cache of type turbo3: use another type" in said


def test_many_sequences_are_not_refused(tools: Tools, shim: Path) -> None:
    """The scheduler may move the attention of a large batch: the cache's device is what counts."""
    options = ("-c", "4096", "-npp", "4", "-ntg", "2", "-npl", "32", "-fit", "off", *cache("q8_0"))
    said = tools.run("llama-batched-bench", *options, shim=shim, OFFLOADED="1")
    assert re.search(r"^\| +4 \| +2 \| +32 \|", said, re.M), said
    asked = Counter(re.findall(r"^asked: (\w+)", said, re.M))
    assert asked["one"] == asked["batch"] == 30  # once per layer


def test_a_cache_in_f16_is_not_probed(tools: Tools, shim: Path) -> None:
    """No question, and no graph more than without Flash Attention."""
    with_, without = (tools.complete(*cache("f16"), "-fa", on, shim=shim) for on in ("on", "off"))
    assert "asked: " not in with_
    assert with_.count("split\n") == without.count("split\n") > 0
    # a quantized cache is asked about, but the answer needs no scheduler
    quantized = tools.complete(*cache("q8_0"), shim=shim)
    assert "asked: " in quantized and quantized.count("split\n") == with_.count("split\n")


# -- the anchor is a parameter of each context --------------------------------------------------------

KV_CACHE = re.compile(r"KV cache: K (\S+), V \S+ .*anchor: (off|\d+, balance: \d+ of 30 layers)")
ON, SOME = "0, balance: 30 of 30 layers", "0, balance: 2 of 30 layers"


@pytest.mark.parametrize(
    ("options", "target", "draft"),
    [
        (("--kv-anchor", "off"), "off", "off"),
        (("--kv-anchor", "on"), ON, ON),
        ((), "off", SOME),  # auto: K is f16, q8_0
        (("--kv-anchor", "on", "--spec-draft-kv-anchor", "off"), ON, "off"),
        (("--spec-draft-kv-anchor", "on"), "off", ON),
    ],
)
def test_target_and_draft(tools: Tools, options: tuple[str, ...], target: str, draft: str) -> None:
    said = speculate(tools, tools.model, *options)
    assert KV_CACHE.findall(said) == [("f16", target), ("q8_0", draft)]
    # and so for all contexts that --fit makes to look at the memory
    states = re.findall(r"kv_anchor: (?:\w+ -> )?(on|off)\b", said)
    target_on, draft_on = ("off" if state == "off" else "on" for state in (target, draft))
    assert len(states) > 2 and set(states) == {target_on, draft_on}


def speculate(tools: Tools, draft: Path, *options: str) -> str:
    base = (
        "-md",
        str(draft),
        "-p",
        "Hello",
        "-n",
        "2",
        "-c",
        "256",
        "-ctkd",
        "q8_0",
        "-ctvd",
        "q8_0",
        "--spec-type",
        "draft-simple",
    )
    return tools.run("llama-speculative-simple", *base, "-lv", "5", *options)


@pytest.mark.parametrize(("anchor", "state"), [("off", "off"), ("on", ON)])
def test_batched_bench(tools: Tools, anchor: str, state: str) -> None:
    options = ("-c", "256", "-npp", "4", "-ntg", "1", "-npl", "1", *cache("q8_0"), "--kv-anchor", anchor)
    said = tools.run("llama-batched-bench", *options)
    assert KV_CACHE.findall(said) == [("q8_0", state)]


@pytest.mark.parametrize("anchor", ["off", "auto", "on"])
def test_fit_measures_the_context_that_runs(tools: Tools, anchor: str) -> None:
    said = tools.complete(*cache("turbo3"), "--kv-anchor", anchor, "-lv", "5", fit="on")
    measured, runs = re.findall(r"kv_anchor: (off|\w+ -> .*)", said)
    assert measured == runs and (measured == "off") is (anchor == "off")
    measured, runs = re.findall(r"Host +\| +(\d+ = +\d+ \+ +\d+ \+ +\d+)", said)
    assert measured == runs


def test_weights_are_read_once_a_process(tools: Tools, tmp_path: Path) -> None:
    other = tmp_path / "draft.gguf"
    other.symlink_to(tools.model)
    for draft, times in ((tools.model, 1), (other, 2)):
        said = speculate(tools, draft, "--kv-anchor", "on")
        assert said.count("kv_anchor: on -> on") >= 4
        assert said.count("kv_anchor: weights read in") == times


# -- memory, and the end of a process -----------------------------------------------------------------


def test_memory_at_exit_counts_the_anchor(tools: Tools) -> None:
    """Of 768 tokens: 8.996 MiB of keys, values and rotations; the constants carry them over 9 MiB."""
    context = {}
    for anchor in ("off", "on"):
        said = tools.complete(*cache("q8_0"), "--kv-anchor", anchor, "-c", "768", "-lv", "4")
        [context[anchor]] = re.findall(r"Host +\| +\d+ = +\d+ \+ +(\d+) \+", said)
    assert context == {"off": "8", "on": "9"}


def interrupt_twice(process: subprocess.Popen[bytes], log: Path, begins: str) -> None:
    """Ctrl-C while a long prompt is computed, and again: its graph is split after `begins` is in the log."""
    limit = time.monotonic() + 60
    while "split" not in log.read_text(errors="replace").partition(begins)[2]:
        assert process.poll() is None and time.monotonic() < limit, log.read_text(errors="replace")[-2000:]
        time.sleep(0.02)
    for _ in range(2):
        time.sleep(0.3)  # between the two, or the kernel makes one of them
        assert process.poll() is None
        process.send_signal(signal.SIGINT)


def test_second_interrupt_ends_llama_cli(tools: Tools, shim: Path, tmp_path: Path) -> None:
    """At once, without the handlers of exit(): one could wait for a lock of the interrupted thread."""
    prompt, log = tmp_path / "prompt.txt", tmp_path / "log"
    prompt.write_text(300 * TEXT)
    options = (
        "-f",
        str(prompt),
        "-c",
        "8192",
        "-b",
        "8192",
        "-ub",
        "8192",
        "-fit",
        "off",
        "--no-warmup",
        "-st",
    )
    with log.open("wb") as sink:
        process = subprocess.Popen(
            tools.argv("llama-cli", *options), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            env=child_environment()[0] | {"LD_PRELOAD": str(shim)},
        )  # fmt: skip
    try:
        interrupt_twice(process, log, "> The ship left")
        assert process.wait(timeout=10) == 130
        assert "exit handlers ran" not in log.read_text(errors="replace")
    finally:
        process.kill()


def test_second_interrupt_ends_llama_server(
    tools: Tools, shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    log = tmp_path / "log"
    options = ["-c", "8192", "-np", "1", "-b", "8192", "-ub", "8192", "-t", "1", "-fit", "off", "--no-warmup"]
    with (
        pytest.raises(AssertionError, match="llama-server ended with 1: "),
        started(tools.build, tools.model, options, log) as server,
    ):
        asking = threading.Thread(target=ask, args=[server])
        asking.start()
        interrupt_twice(server.process, log, "processing task")
        assert server.process.wait(timeout=10) == 1
        asking.join()
    assert "Received second interrupt" in log.read_text() and "exit handlers ran" not in log.read_text()


def ask(server: LlamaServer) -> None:
    """A question that gets no answer."""
    with pytest.raises(httpx2.TransportError):
        server.post("/completion", {"prompt": 300 * TEXT, "n_predict": 1})


def test_the_preloaded_library_sees_exit_handlers(tools: Tools, shim: Path) -> None:
    assert "exit handlers ran" in tools.complete(shim=shim)
