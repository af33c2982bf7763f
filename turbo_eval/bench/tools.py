"""llama-bench and llama-batched-bench: their command lines, and the speeds that they print."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_eval.bench.plan import TOOL, BenchPlan, Candidate, Step
from turbo_eval.llama.backends import backend
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import LOGGING

# Tests of a draft in one process: one is a single step of the model, too short to be measured once.
DRAFT_TESTS = 5
_PADDING = 256  # llama.cpp rounds the context of a sequence up to a multiple of it


@dataclass(frozen=True)
class Speeds:
    """Tokens/s of the prompts and of the new tokens, of all sequences together; None where not measured."""

    prefill: float | None = None
    decode: float | None = None


def bench_argv(plan: BenchPlan, candidate: Candidate, step: Step, model: Path, build: Build) -> list[str]:
    """The command of one run. No variable of the environment adds to it."""
    argv = [str(build.tool(TOOL[step.workload])), "-m", str(model), *_cache(candidate), "-fa", "on"]
    argv += ["-t", str(plan.threads)]
    if step.workload == "parallel":
        each = math.ceil((plan.prompt + plan.gen) / _PADDING) * _PADDING
        argv += ["-c", str(each * max(step.sizes)), "-npp", str(plan.prompt), "-ntg", str(plan.gen)]
        # the first test of a process pays for what is done once: it runs twice, and the second one counts
        argv += ["-npl", ",".join(map(str, (min(step.sizes), *step.sizes))), "--output-format", "jsonl"]
        return [*argv, *backend(plan.backend).device_flags(), *LOGGING]
    if step.workload == "draft":
        argv += ["-p", ",".join(map(str, step.sizes)), "-n", "0", "-r", str(DRAFT_TESTS)]
    else:
        argv += ["-p", str(plan.prompt), "-n", str(plan.gen), "-r", "1"]
    argv += ["-d", str(step.depth), "-o", "jsonl", "-v"]
    return argv + backend(plan.backend).bench_flags()


def _cache(candidate: Candidate) -> list[str]:
    argv = ["-ctk", candidate.k, "-ctv", candidate.v]
    if candidate.profile is not None:
        argv = ["--kv-profile", str(candidate.profile)]
    if candidate.anchor is not None:
        argv += ["--kv-anchor", candidate.anchor]
    if candidate.window is not None:
        argv += ["--kv-recent", str(candidate.window.recent), "--kv-first", str(candidate.window.first)]
    return argv


def read_speeds(text: str, step: Step) -> dict[int, Speeds]:
    """The speeds for each of the step's sizes, of the JSON lines among a log; a size without a finite speed
    is left out."""
    found: dict[int, Speeds] = {}
    for test in _tests(text):
        if step.workload == "parallel" and "pl" in test:
            found[int(test["pl"])] = Speeds(float(test["speed_pp"]), float(test["speed_tg"]))
        elif step.workload == "draft" and test.get("samples_ts"):
            found[int(test["n_prompt"])] = Speeds(decode=statistics.median(map(float, test["samples_ts"])))
        elif step.workload == "depth" and "avg_ts" in test:
            own, speed = found.get(1, Speeds()), float(test["avg_ts"])
            found[1] = Speeds(own.prefill, speed) if test["n_gen"] else Speeds(speed, own.decode)
    return {size: s for size, s in found.items() if size in step.sizes and _sound(s)}


def _sound(speeds: Speeds) -> bool:
    return all(x is None or (math.isfinite(x) and x > 0) for x in (speeds.prefill, speeds.decode))


def _tests(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
