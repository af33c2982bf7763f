"""Tasks: questions with choices through llama-perplexity's own modes, against f16/f16's answers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from turbo_eval.evidence.paired import mcnemar
from turbo_eval.llama import output
from turbo_eval.llama.tool import perplexity_argv
from turbo_eval.metrics import judge
from turbo_eval.metrics.base import Bench, Extent, Job, Metric, OnProgress, Options, figure, n
from turbo_eval.metrics.tasks.data import TASKS, digest, questions, written
from turbo_eval.metrics.tool import record_of, run_of
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.records.reference import exact_generation_cell, is_exact
from turbo_eval.util.process import child_environment, run

# "17<tab>64.70588235%…": questions so far, percent of them right
_SCORE = re.compile(r"^(\d+)\t\s*([\d.]+)%?(?:\t|$)", re.M)


class TasksOptions(Options):
    """The first `questions` of a task: from the hub, or the rows in `file` (JSON lines with its fields)."""

    name: Literal["hellaswag", "winogrande", "arc-easy", "arc-challenge", "mmlu"] = "hellaswag"
    questions: n.Count = 100
    file: str = ""


class Tasks(Metric):
    name = "tasks"
    options = TasksOptions
    own_exact = True
    columns = (figure("tasks_right_pct", "task right %", "{:.1f}"), figure("tasks_p", "task p", "{:.3f}"))
    docs = "docs/explanation/method.md#tasks"

    def lay_out(self, extent: Extent) -> dict[str, Any]:
        assert isinstance(extent.options, TasksOptions)
        options = extent.options.model_dump(mode="json")
        return {"chunks": options.pop("questions"), "ubatch": extent.ubatch, "options": options}

    def exact(self, cell: Cell) -> Cell | None:
        return exact_generation_cell(cell)

    def references(self, cell: Cell) -> tuple[Cell, ...]:
        return () if is_exact(cell) else (exact_generation_cell(cell),)

    def seconds(self, job: Job, threads: int) -> float:
        return 2.0 + job.cell.chunks * 200 * 2 * job.model.size * 8 / 5 / (threads * 3e10)

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        cell = job.cell
        mode = TASKS[cell.options["name"]].mode
        content = written(mode, questions(cell.options["name"], cell.chunks, cell.options["file"]))
        log = bench.store.log_path(cell)
        env, removed = child_environment()
        with tempfile.TemporaryDirectory(prefix="turbo-eval-") as folder:
            asked = Path(folder) / "questions"
            asked.write_bytes(content)
            argv = _command(job, bench, mode, asked)
            seen: list[str] = []

            def follow(text: str) -> bool:
                seen.append(text)
                done = [int(number) for number, _ in _SCORE.findall("".join(seen))]
                on_progress(max(done, default=0), cell.chunks, None)
                return False

            outcome = run(argv, log=log, env=env, timeout=bench.timeout, on_text=follow)
        state = output.parse_effective(outcome.text)
        right = outcomes(outcome.text)
        fault = judge.judge_process(outcome, bench.timeout) or judge.judge_state(cell, state)
        if fault is None and len(right) != cell.chunks:
            why = output.last_error(outcome.text) or f"{len(right)} of {cell.chunks} questions were answered"
            fault = ("no-result", why)
        figures: dict[str, float | str] = {}
        if fault is None:
            exact = references[0].figures if references else None
            same = exact is None or exact["tasks_sha256"] == digest(content)
            if exact is None and not is_exact(cell):
                fault = ("no-result", "there is no f16/f16 result to compare with")
            elif not same:
                fault = ("base-invalid", "f16/f16 was asked other questions; run it again with --fresh")
            else:
                figures = compare_tasks(right, str(exact["tasks_right"]) if exact else right)
                figures["tasks_sha256"] = digest(content)
        info = run_of(outcome, argv, removed, bench, log)
        return record_of(cell, info, bench, state, fault, None, figures=figures)

    def words(self, record: Record) -> str:
        told = record.figures
        return f"{record.cell.options['name']} {told['tasks_right_pct']:.1f} % right, p {told['tasks_p']:.3f}"


def _command(job: Job, bench: Bench, mode: str, asked: Path) -> list[str]:
    argv = perplexity_argv(
        job.cell,
        bench.build,
        model=job.model.path,
        corpus=asked,
        threads=bench.threads,
        anchor=job.anchor,
        profile=job.profile,
    )
    if mode == "multiple-choice":
        argv[argv.index("-f")] = "-bf"
    return [*argv, f"--{mode}", f"--{mode}-tasks", str(job.cell.chunks)]


def outcomes(text: str) -> str:
    """ "1" for each question that was answered right, "0" for the others, from the running percentages.

    A question that was left out ends the count: what follows belongs to others.
    """
    found, right = "", 0
    for number, percent in _SCORE.findall(text):
        total = float(percent) * int(number) / 100
        if (
            int(number) != len(found) + 1
            or abs(total - round(total)) > 0.01
            or round(total) - right not in (0, 1)
        ):
            break
        found += str(round(total) - right)
        right = round(total)
    return found


def compare_tasks(right: str, exact: str) -> dict[str, float | str]:
    """Answers ("1": right) of a cache and of f16/f16 to the same questions, with McNemar's exact p."""
    pairs = list(zip(right, exact, strict=True))
    lost, won = pairs.count(("0", "1")), pairs.count(("1", "0"))
    return {
        "tasks_right_pct": 100 * right.count("1") / len(right),
        "tasks_f16_pct": 100 * exact.count("1") / len(exact),
        "tasks_lost": lost,
        "tasks_won": won,
        "tasks_p": mcnemar(lost, won),
        "tasks_right": right,
    }
