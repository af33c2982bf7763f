"""Which keys llama.cpp takes from an exact window: its own test, run and counted."""

from __future__ import annotations

import re
import subprocess

from turbo_eval.formats.window import Window
from turbo_eval.selftest.ggml import Ggml
from turbo_eval.selftest.result import Result
from turbo_eval.util.process import child_environment

TOOL = "test-kv-window"
STEPS, SEEDS = 3000, 2
LARGEST = 1024  # tokens of recent and first together
_SLOTS = re.compile(
    r"^slots: .*: (\d+) ubatches \(\d+ through a copy\), (\d+) keys exact, (\d+) not: (OK|FAIL)$", re.M
)


def partition(window: Window, ggml: Ggml) -> Result:
    """Random operations on sequences: append, remove, copy, shift, save, restore, roll back.

    After each, every key that a query sees must be used once, exact or quantized, and exact where the rule
    says so (docs/explanation/exact-window.md), against a plain list of keys that the test keeps beside.
    """
    tool = ggml.bin_dir / TOOL
    if not tool.is_file():
        return Result(None, f"{tool.parent} has no {TOOL}: build it to check which keys are exact")
    # the work of a step grows with the square of the window
    steps = max(100, STEPS * 132**2 // max(132, window.recent + window.first) ** 2)
    argv = [str(tool), str(steps), str(SEEDS), str(window.recent), str(window.first)]
    env, _ = child_environment()
    done = subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=env,
    )
    runs = _SLOTS.findall(done.stdout)
    faults = [line for line in done.stdout.splitlines() if re.match(r"\S+:\d+: ", line)]
    if done.returncode != 0 or not runs or any(word != "OK" for *_, word in runs):
        why = faults[0] if faults else f"{TOOL} ended with {done.returncode} after {len(runs)} runs"
        return Result(False, why)
    batches, exact, rest = (sum(int(run[i]) for run in runs) for i in range(3))
    return Result(
        True,
        f"{len(runs)} × {steps} operations, {batches} batches: {exact + rest} uses of keys, each once,"
        f" {exact} exact and {rest} quantized",
    )
