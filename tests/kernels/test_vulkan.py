"""The Vulkan build, on llvmpipe where there is no GPU: operations and a whole model against the CPU, and
planted faults that they have to see. `make test-vulkan` runs it with what is slow."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import absent
from tests.kernels import vulkan_faults, vulkan_ops
from tests.support.harness import Cli
from turbo_eval.errors import EnvironmentProblem, TurboEvalError
from turbo_eval.evidence.tokens import load
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.backends import vulkan_loader
from turbo_eval.llama.build import Build, find_build

pytestmark = pytest.mark.timeout(3600)
AGAIN = "run `make build-vulkan TOOLS=minimal`"


@pytest.fixture(scope="module", autouse=True)
def vulkan() -> Build:
    """The Vulkan build of the sources as they are, and a device to run it on."""
    try:
        found = find_build("vulkan")
    except TurboEvalError as problem:
        absent(problem)
    if not found.current():
        absent(EnvironmentProblem("build/src is not what the Vulkan build was made from", AGAIN))
    if not vulkan_loader.devices():
        install = "install one, e.g. `apt-get install mesa-vulkan-drivers`"
        absent(EnvironmentProblem("no Vulkan driver lists a device", install))
    return found


@pytest.mark.parametrize("op", vulkan_ops.CI)
def test_operations_agree_with_the_cpu(op: str) -> None:
    patterns = vulkan_ops.CI[op]
    passed, total, output = vulkan_ops.run(op, "|".join(patterns))
    print(f"{op}: {passed}/{total} passed")
    assert passed == total, output[-4000:]
    assert vulkan_ops.missed(output, patterns) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", vulkan_ops.SHORT)
def test_longer_lists_agree_with_the_cpu(op: str) -> None:
    passed, total, output = vulkan_ops.run(op, vulkan_ops.SHORT[op])
    assert 0 < passed == total, output[-4000:]


def test_without_a_device_no_case_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VK_ICD_FILENAMES", "")
    monkeypatch.setenv("VK_DRIVER_FILES", "")
    patterns = vulkan_ops.CI["GET_ROWS"]
    passed, _, output = vulkan_ops.run("GET_ROWS", "|".join(patterns))
    assert passed == 0 and "Vulkan" not in output, output
    assert vulkan_ops.missed(output, patterns) == list(patterns)


def test_rotation_and_both_writes_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact window, with RoPE and the K anchor before it: nothing is a kernel of its own."""
    monkeypatch.setenv("GGML_VK_PERF_LOGGER", "1")
    passed, total, output = vulkan_ops.run("ROPE_HADAMARD", "type=turbo3,n=64,.*type_win")
    assert 0 < passed == total, output[-4000:]
    ran = set(re.findall(r"^(\w+)\b.*: \d+ x \S+ us", output, re.M))
    checked = {"CPY", "CONCAT"}  # what the cases look at the rows with
    assert ran - checked == {
        "ROT_SET_ROWS_SET_ROWS",
        "ROPE_ROT_SET_ROWS_SET_ROWS",
        "ROPE_ANCHOR_ROT_SET_ROWS_SET_ROWS",
    }


def test_the_rotation_is_on_both_of_two_devices(smollm: ModelFile, prose: CorpusFile) -> None:
    """A layer on the second device must not read constants of the first: CUDA would not run it there."""
    args = ["-m", str(smollm.path), "-f", str(prose.path), "-ngl", "99", "-fa", "on", "-v"]
    args += ["-c", "32", "-b", "32", "-ub", "32", "--chunks", "1", "--kv-recent", "0", "--kv-first", "0"]
    done = subprocess.run(
        [find_build("vulkan").tool("llama-kv-eval"), *args, "--pair", "q8_0:q8_0"],
        capture_output=True,
        text=True,
        errors="replace",
        env=vulkan_ops.environment() | {"GGML_VK_VISIBLE_DEVICES": "0,0", "GGML_SCHED_DEBUG": "2"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    second = re.findall(r"## SPLIT #\d+: Vulkan1 # \d+ inputs.*", done.stdout + done.stderr)
    assert second and all("attn_inp_kq_mask" in inputs and "rot" not in inputs for inputs in second), second


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name.split(":")[0], marks=() if fault.quick else pytest.mark.slow)
        for fault in vulkan_faults.FAULTS
    ],
)
def test_a_planted_fault_is_caught(fault: vulkan_faults.Fault) -> None:
    passed, total, output = vulkan_ops.run(fault.op, fault.params)
    assert 0 < passed == total, output[-4000:]
    failed, _ = vulkan_faults.caught(fault)
    assert failed > 0


def test_every_fault_has_its_place() -> None:
    """Also of those that are slow: the text that is replaced is in its shader, once."""
    for fault in vulkan_faults.FAULTS:
        assert vulkan_faults.shader_text(fault).count(fault.old) == 1, fault.name


PAIRS = ("f16", "turbo3", "turbo4")
# the cache alone: an exact window would hold all of these tokens
MODEL = ("--metrics", "kld", "--recent", "0", "--anchor", "off", "--ctx", "128", "--chunks", "1")


@dataclass(frozen=True)
class Measured:
    """A record, and the KL divergence of each scored token from f16/f16, in nats."""

    record: dict[str, Any]
    kld: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Standard error of the mean, over tokens."""
        return float(self.kld.std(ddof=1) / math.sqrt(self.kld.size))


def sweep(cli: Cli, model: Path, text: Path, backend: str, env: dict[str, str]) -> dict[str, Measured]:
    """Each type beside itself."""
    pairs = ",".join(f"{each}:{each}" for each in PAIRS)
    args = ("--model", model, "--corpus", text, "--pairs", pairs, *MODEL, "--backend", backend)
    done = cli.sweep(*args, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = cli.results.iterdir()
    found = {}
    for record in cli.records():
        tokens = load(folder / record["tokens"]["file"], record["tokens"]["sha256"])
        found[record["cell"]["k"]] = Measured(record, tokens.kld.astype(np.float64).ravel())
    return found


def test_whole_model_equals_the_cpu(
    vulkan: Build, build: Build, smollm: ModelFile, prose: CorpusFile, tmp_path: Path
) -> None:
    """KL divergences from f16/f16 are those of the CPU, within two standard errors of both means.

    The errors are taken as if both had seen different texts, so that what differs by rounding does not fail
    on another machine.
    """
    args = (smollm.path, prose.path)
    device = sweep(Cli(tmp_path / "vulkan", vulkan.bin_dir), *args, "vulkan", vulkan_ops.environment())
    cpu = sweep(Cli(tmp_path / "cpu", build.bin_dir), *args, "cpu", {})
    for each in PAIRS:
        there, here = device[each], cpu[each]
        assert there.record["status"] == here.record["status"] == "ok"
        effective = there.record["effective"]
        assert effective["kv_devices"] == ["Vulkan0"]
        assert effective["layers_offloaded"] == effective["layers"]
        means, bound = (there.kld.mean(), here.kld.mean()), 2 * math.hypot(there.error, here.error)
        print(f"{each}: KL divergence {means[0]:.4f}, CPU {means[1]:.4f}, at most {bound:.4f} apart")
        assert there.kld.size == here.kld.size > 0
        assert abs(means[0] - means[1]) <= bound
        assert (means[0] == 0) == (each == "f16")
    assert device["turbo3"].kld.mean() > device["turbo4"].kld.mean()
