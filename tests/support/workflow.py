"""Runs a job of a workflow file here: the shell steps in order, with GitHub's contexts and files.

Steps that `use` an action are not run; whoever calls this says what they would have done. An expression is
evaluated as GitHub would; what it names must exist, so that a misspelt input or step fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_TOKEN = re.compile(
    r"\s*(?:(?P<string>'(?:[^']|'')*')|(?P<op>&&|\|\||==|!=|!|\(|\)|,)|(?P<name>[A-Za-z_][\w-]*(?:\.[\w-]+)*))"
)
_PYTHON = {"&&": " and ", "||": " or ", "!": " not "}


def load(path: Path) -> dict[str, Any]:
    """The file; YAML 1.1 reads the key `on` as true."""
    data: dict[Any, Any] = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in data.items()}


class Variables(dict[str, str]):
    """The repository's variables: what isn't set is empty."""

    def __missing__(self, name: str) -> str:
        return ""


@dataclass
class StepRun:
    """One step: `outcome` as GitHub names it, "uses" for an action that was left out."""

    name: str
    outcome: str
    output: str = ""


@dataclass
class JobRun:
    """All steps, and whether the job is red; `used` are those that use an action and were due."""

    steps: list[StepRun] = field(default_factory=list)
    used: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""

    def step(self, name: str) -> StepRun:
        return next(step for step in self.steps if step.name == name)

    def log(self) -> str:
        return "\n".join(f"== {step.name}: {step.outcome}\n{step.output}" for step in self.steps)


def evaluate(text: str, context: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Any:
    """Value of an expression (without the braces).

    Raises:
        KeyError: it names something that isn't there.
    """
    python, position = "", 0
    while text[position:].strip():
        found = _TOKEN.match(text, position)
        assert found, f"cannot read {text[position:]!r}"
        position = found.end()
        if found["string"]:
            python += repr(found["string"][1:-1].replace("''", "'"))
        elif found["op"]:
            python += _PYTHON.get(found["op"], found["op"])
        elif text[position:].lstrip().startswith("("):
            python += f"functions[{found['name']!r}]"
        else:
            python += f"look({found['name']!r})"

    def look(name: str) -> Any:
        value: Any = context
        for part in name.split("."):
            value = value[part]
        return value

    return eval(python, {"functions": functions, "look": look})


def fill(text: str, context: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> str:
    """Replace every `${{ … }}`."""
    return re.sub(r"\$\{\{(.+?)\}\}", lambda m: str(evaluate(m[1], context, functions)), text)


def condition(text: str, context: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> bool:
    """An `if:`, with or without braces."""
    whole = re.fullmatch(r"\s*\$\{\{(.+)\}\}\s*", text, re.S)
    return bool(evaluate(whole[1] if whole else text, context, functions))


def run_job(
    job: Mapping[str, Any],
    *,
    inputs: Mapping[str, Any],
    workspace: Path,
    scratch: Path,
    env: Mapping[str, str],
    context: Mapping[str, Any] | None = None,
    uses: Callable[[Mapping[str, Any]], None] = lambda step: None,
) -> JobRun:
    """Run the shell steps of a job in `workspace`.

    Args:
        scratch: for GITHUB_OUTPUT and its like.
        env: the machine's environment.
        context: further contexts, e.g. `needs`.
        uses: told of each step that uses an action, with its expressions filled in.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    run = JobRun()
    steps: dict[str, Any] = {}
    known = {
        "inputs": inputs,
        "steps": steps,
        "github": {
            "workspace": str(workspace),
            "token": "none",
            "event": {"number": 7},
            "event_name": "push",
        },
        "runner": {"os": "Linux", "environment": "self-hosted"},
        "vars": Variables(),
        **(context or {}),
    }
    functions: dict[str, Callable[..., Any]] = {
        "cancelled": lambda: False,
        "always": lambda: True,
        "success": lambda: not run.failed,
        "failure": lambda: run.failed,
        "fromJSON": json.loads,
        "hashFiles": lambda *names: "hash" if any((workspace / name).is_file() for name in names) else "",
    }
    files = {name: scratch / name for name in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
    machine = {**env, **{name: str(path) for name, path in files.items()}, "RUNNER_OS": "Linux"}
    machine |= {key: fill(str(value), known, functions) for key, value in job.get("env", {}).items()}
    for step in job["steps"]:
        name = step.get("name", step.get("uses", ""))
        wanted = str(step.get("if", "success()"))
        speaks = re.search(r"\b(always|cancelled|failure|success)\(\)", wanted)
        due = condition(wanted, known, functions) and (bool(speaks) or not run.failed)
        done = StepRun(name, "skipped")
        if due and "uses" in step:
            filled = {key: fill(str(value), known, functions) for key, value in step.get("with", {}).items()}
            run.used.append(dict(step) | {"with": filled})
            uses(run.used[-1])
            done.outcome = "uses"
        elif due:
            for path in files.values():
                path.touch()
            before = files["GITHUB_OUTPUT"].stat().st_size
            own = {key: fill(str(value), known, functions) for key, value in step.get("env", {}).items()}
            script = scratch / "step.sh"
            script.write_text(fill(step["run"], known, functions))
            ended = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
                cwd=workspace,
                env=machine | own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            done.output = ended.stdout
            done.outcome = "success" if ended.returncode == 0 else "failure"
            new = files["GITHUB_OUTPUT"].read_text()[before:]
            outputs = dict(line.split("=", 1) for line in new.splitlines())
            if ended.returncode and not step.get("continue-on-error"):
                run.failed = True
        if "id" in step:
            steps[step["id"]] = {
                "outcome": done.outcome,
                "outputs": outputs if due and "run" in step else {},
            }
        run.steps.append(done)
    run.outputs = {key: fill(str(value), known, functions) for key, value in job.get("outputs", {}).items()}
    run.summary = files["GITHUB_STEP_SUMMARY"].read_text() if files["GITHUB_STEP_SUMMARY"].is_file() else ""
    return run


def environment(python: Path) -> dict[str, str]:
    """A runner's environment whose `python` is this one, and on whose PATH its turbo-eval lies."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TURBO_EVAL_")}
    return env | {
        "PATH": f"{python.parent}{os.pathsep}{env['PATH']}",
        "VIRTUAL_ENV": str(python.parent.parent),
    }
