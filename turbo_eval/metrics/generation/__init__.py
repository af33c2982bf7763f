"""Text generated through llama-cpp-python with our libraries: what greedy agreement and needles share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turbo_eval.llama import bindings, output
from turbo_eval.llama.backends import backend
from turbo_eval.metrics import judge
from turbo_eval.metrics.base import Bench, Job, Metric, OnProgress
from turbo_eval.metrics.tool import record_of, run_of
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.records.reference import exact_generation_cell, is_exact
from turbo_eval.util import python
from turbo_eval.util.process import Outcome, child_environment, run

WORKER = "turbo_eval.metrics.generation.worker"


class Generation(Metric):
    """A metric over generated text, against that of f16/f16 of the same build."""

    own_exact = True

    def context(self, cell: Cell) -> int:
        """Tokens of context that it needs."""
        raise NotImplementedError

    def text(self, cell: Cell) -> int:
        """Tokens of the corpus that it needs."""
        raise NotImplementedError

    def steps(self, cell: Cell) -> int:
        """How many lines the worker says, for progress."""
        raise NotImplementedError

    def figures(self, result: dict[str, Any], exact: Record | None) -> dict[str, Any]:
        """Fields of the record from what the worker wrote; `exact` is f16/f16's, None: this is it."""
        raise NotImplementedError

    def exact(self, cell: Cell) -> Cell | None:
        return exact_generation_cell(cell)

    def references(self, cell: Cell) -> tuple[Cell, ...]:
        return () if is_exact(cell) else (exact_generation_cell(cell),)

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        bindings.require()
        cell = job.cell
        with tempfile.TemporaryDirectory(prefix="turbo-eval-") as folder:
            written = Path(folder) / "output.json"
            request = Path(folder) / "job.json"
            request.write_text(json.dumps(self._request(job, bench, written)), encoding="utf-8")
            argv = python.command("-m", WORKER, request)
            env, removed = child_environment()
            env["LLAMA_CPP_LIB_PATH"] = str(bench.build.bin_dir.resolve())
            if job.anchor is not None:
                in_file = Path(job.anchor).is_file()
                env["LLAMA_ARG_KV_ANCHOR"] = str(Path(job.anchor).resolve()) if in_file else job.anchor
            env["LLAMA_ARG_KV_RECENT"], env["LLAMA_ARG_KV_FIRST"] = str(cell.recent), str(cell.first)
            if job.profile is not None:
                env["LLAMA_ARG_KV_PROFILE"] = str(job.profile.resolve())
            log = bench.store.log_path(cell)
            outcome = run(
                argv,
                log=log,
                env=python.environment(env),
                timeout=bench.timeout,
                on_text=self._follow(cell, on_progress),
                cwd=Path(folder),
            )
            result = json.loads(written.read_text(encoding="utf-8")) if written.exists() else None
        effective = output.parse_effective(outcome.text)
        fault = _fault(cell, outcome, bench) or _missing(outcome, result)
        figures: dict[str, Any] = {}
        if fault is None:
            exact = references[0] if references else None
            if exact is None and not is_exact(cell):
                fault = ("no-result", "there is no f16/f16 result to compare with")
            else:
                figures = self.figures(result or {}, exact)
        run_info = run_of(outcome, argv, removed, bench, log)
        return record_of(cell, run_info, bench, effective, fault, **figures)

    def _request(self, job: Job, bench: Bench, written: Path) -> dict[str, Any]:
        cell = job.cell
        return {
            "metric": cell.metric,
            "model": str(job.model.path.resolve()),
            "corpus": str(job.corpus.path.resolve()),
            # a profile's types are in its file; f16 is what the library takes for "not given"
            "k": cell.k if cell.profile is None else "f16",
            "v": cell.v if cell.profile is None else "f16",
            "n_ctx": -(-self.context(cell) // 256) * 256,
            "need_tokens": self.text(cell),
            "threads": bench.threads,
            "gpu_layers": backend(cell.backend).gpu_layers(),
            "options": cell.options,
            "output": str(written),
        }

    def _follow(self, cell: Cell, on_progress: OnProgress) -> Callable[[str], bool]:
        total, seen = self.steps(cell), 0

        def follow(text: str) -> bool:
            nonlocal seen
            seen += text.count(f"{cell.metric} ")
            on_progress(min(seen, total), total, None)
            return False

        return follow


def _fault(cell: Cell, outcome: Outcome, bench: Bench) -> judge.Fault | None:
    # The context is the metric's own, not the cell's, so only the rest of the state is compared.
    state = output.parse_effective(outcome.text).model_copy(update={"ctx": None})
    return judge.judge_process(outcome, bench.timeout) or judge.judge_state(cell, state)


def _missing(outcome: Outcome, result: object) -> judge.Fault | None:
    if result is not None:
        return None
    return "no-result", output.last_error(outcome.text) or "it wrote no result"
