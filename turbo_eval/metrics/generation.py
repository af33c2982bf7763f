"""Greedy agreement and needle retrieval, each against f16/f16 of the same build."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from turbo_eval.llama import bindings, output
from turbo_eval.llama.backends import backend
from turbo_eval.metrics import judge
from turbo_eval.metrics.job import Job
from turbo_eval.metrics.perplexity import Bench, OnProgress
from turbo_eval.records.record import Cell, Greedy, Needle, Record, Run
from turbo_eval.records.reference import is_exact, references
from turbo_eval.util import python
from turbo_eval.util.process import Outcome, child_environment, relevant_environment, run

WORKER = "turbo_eval.metrics.generation_worker"


def measure(job: Job, bench: Bench, on_progress: OnProgress) -> Record:
    """Run a "greedy" or "needle" cell and judge it.

    Raises:
        EnvironmentProblem: llama-cpp-python is missing, or the log cannot be written.
        KeyboardInterrupt: after ending the process; nothing is recorded.
    """
    bindings.require()
    cell = job.cell
    with tempfile.TemporaryDirectory(prefix="turbo-eval-") as folder:
        output = Path(folder) / "output.json"
        request = Path(folder) / "job.json"
        request.write_text(json.dumps(_request(job, bench, output)), encoding="utf-8")
        argv = python.command("-m", WORKER, request)
        env, removed = child_environment()
        env["LLAMA_CPP_LIB_PATH"] = str(bench.build.bin_dir.resolve())
        if job.anchor is not None:
            in_file = Path(job.anchor).is_file()
            env["LLAMA_ARG_KV_ANCHOR"] = str(Path(job.anchor).resolve()) if in_file else job.anchor
        env["LLAMA_ARG_KV_RECENT"], env["LLAMA_ARG_KV_FIRST"] = str(cell.recent), str(cell.first)
        log = bench.store.log_path(cell)
        outcome = run(
            argv,
            log=log,
            env=python.environment(env),
            timeout=bench.timeout,
            on_text=_follow(cell, on_progress),
            cwd=Path(folder),
        )
        result = json.loads(output.read_text(encoding="utf-8")) if output.exists() else None
    info = Run(
        argv=tuple(argv),
        env=relevant_environment(),
        env_removed=removed,
        started=outcome.started,
        seconds=outcome.seconds,
        cpu_seconds=outcome.cpu_seconds,
        peak_mib=outcome.peak_mib,
        returncode=outcome.returncode,
        threads=bench.threads,
        log=str(log.relative_to(bench.store.root)),
    )
    return _conclude(cell, outcome, info, result, bench)


def needed_context(cell: Cell) -> int:
    """Tokens of context the metric needs."""
    if cell.metric == "greedy":
        return int(cell.options["prompt_tokens"]) + int(cell.options["tokens"])
    return int(max(cell.options["lengths"])) + 16


def _request(job: Job, bench: Bench, output: Path) -> dict[str, Any]:
    cell = job.cell
    n_ctx = -(-needed_context(cell) // 256) * 256
    per_prompt = cell.options["prompt_tokens"] if cell.metric == "greedy" else max(cell.options["lengths"])
    return {
        "metric": cell.metric,
        "model": str(job.model.path.resolve()),
        "corpus": str(job.corpus.path.resolve()),
        "k": cell.k,
        "v": cell.v,
        "n_ctx": n_ctx,
        "need_tokens": per_prompt * cell.options.get("prompts", 1),
        "threads": bench.threads,
        "gpu_layers": backend(cell.backend).gpu_layers(),
        "options": cell.options,
        "output": str(output),
    }


def _follow(cell: Cell, on_progress: OnProgress) -> Any:
    options = cell.options
    total = (
        options["prompts"] if cell.metric == "greedy" else len(options["lengths"]) * len(options["depths"])
    )
    seen = 0

    def follow(text: str) -> bool:
        nonlocal seen
        seen += text.count(f"{cell.metric} ")
        on_progress(min(seen, total), total, None)
        return False

    return follow


def _conclude(cell: Cell, outcome: Outcome, info: Run, result: dict[str, Any] | None, bench: Bench) -> Record:
    effective = output.parse_effective(outcome.text)
    verdict = judge.judge_process(outcome, bench.timeout)
    # The context is the metric's own, not the cell's, so only the rest of the state is compared.
    state = effective.model_copy(update={"ctx": None})
    verdict = verdict or judge.judge_state(cell, state)
    if verdict is None and result is None:
        verdict = ("no-result", output.last_error(outcome.text) or "it wrote no result")
    greedy: Greedy | None = None
    needle: Needle | None = None
    if verdict is None and result is not None:
        exact = _f16_record(cell, bench)
        if exact is None and not is_exact(cell):
            verdict = ("no-result", "there is no f16/f16 result to compare with")
        elif cell.metric == "greedy":
            outputs = tuple(tuple(o) for o in result["outputs"])
            greedy = compare_greedy(outputs, exact.greedy.outputs if exact and exact.greedy else outputs)
        else:
            hits = [tuple(d) for d in result["detail"]]
            needle = compare_needle(hits, exact.needle if exact else None)
    return Record(
        key=cell.key(),
        cell=cell,
        status=verdict[0] if verdict else "ok",
        detail=verdict[1] if verdict else "",
        greedy=greedy,
        needle=needle,
        effective=effective,
        run=info,
        provenance=bench.provenance,
    )


def _f16_record(cell: Cell, bench: Bench) -> Record | None:
    for reference in references(cell):
        record = bench.store.load(reference)
        if record is not None and record.ok:
            return record
    return None


def compare_greedy(outputs: tuple[tuple[int, ...], ...], exact: tuple[tuple[int, ...], ...]) -> Greedy:
    """Count the tokens before the first difference, prompt by prompt."""
    firsts: list[int] = []
    agree = 0
    for ours, theirs in zip(outputs, exact, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is None and len(ours) != len(theirs):
            same = min(len(ours), len(theirs))
        agree += len(theirs) if same is None else same
        if same is not None:
            firsts.append(same)
    total = sum(len(theirs) for theirs in exact)
    return Greedy(
        prompts=len(exact),
        tokens=total,
        identical_pct=100 * (len(exact) - len(firsts)) / len(exact),
        agree_pct=100 * agree / total,
        first_divergence=statistics.median(firsts) if firsts else None,
        outputs=outputs,
    )


def compare_needle(hits: list[tuple[Any, ...]], exact: Needle | None) -> Needle:
    """A probe counts only where f16 finds the needle."""
    truth = [found for _, _, _, found in exact.detail] if exact else [bool(h[2]) for h in hits]
    detail = tuple(
        (int(length), float(depth), known, bool(found))
        for (length, depth, found), known in zip(hits, truth, strict=True)
    )
    return Needle(
        probes=len(detail),
        f16_hits=sum(f for _, _, f, _ in detail),
        hits=sum(f and hit for _, _, f, hit in detail),
        detail=detail,
    )
