"""Trajectories: f16/f16 generates, and a cache is scored along what it generated, one token at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from turbo_eval.errors import TurboEvalError
from turbo_eval.evidence.kv_eval import KvEval, read_kv_eval
from turbo_eval.evidence.tokens import Tokens, save
from turbo_eval.evidence.trajectory import along
from turbo_eval.formats.window import OFF
from turbo_eval.llama import output
from turbo_eval.llama.tool import kv_eval_argv, kv_eval_pair
from turbo_eval.metrics import judge
from turbo_eval.metrics.base import Bench, Extent, Job, Metric, OnProgress, Options, figure, n
from turbo_eval.metrics.tool import record_of, run_of
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Effective, Record, TokenFile, finite
from turbo_eval.util.process import Outcome, child_environment, run

_REFERENCE = kv_eval_pair("f16", "f16", "off", OFF)
_SOME_PAIR = 3  # exit code of llama-kv-eval


class TrajectoryOptions(Options):
    """From each of `prompts` passages, half a context long, f16 generates the other half: once with the most
    probable tokens, and once for each of `seeds` sampled at `temperature`."""

    prompts: n.Count = 2
    seeds: n.Count = 1
    temperature: n.Seconds = 0.8


class Trajectory(Metric):
    name = "trajectory"
    options = TrajectoryOptions
    columns = (
        figure("trajectory_kld", "KLD along", "{:z.5f}"),
        figure("trajectory_same_pct", "same choice %", "{:.2f}"),
        figure("trajectory_free_pct", "free same %", "{:.1f}"),
    )
    docs = "docs/explanation/method.md#trajectories"

    def lay_out(self, extent: Extent) -> dict[str, Any]:
        assert isinstance(extent.options, TrajectoryOptions)
        options = extent.options.model_dump(mode="json")
        return {"chunks": options.pop("prompts"), "ubatch": extent.ubatch, "options": options}

    def seconds(self, job: Job, threads: int) -> float:
        # each token of both caches reads all weights once
        runs = 2 * (1 + int(job.cell.options["seeds"]))
        return 2.0 + job.cell.ctx / 2 * job.cell.chunks * runs * job.model.size / 6e9

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        cell = job.cell
        log = bench.store.log_path(cell)
        out = log.with_suffix(".part")
        pair, argv = _command(job, bench, out)
        env, removed = child_environment()
        seen, total = 0, cell.chunks * (1 + int(cell.options["seeds"]))

        def follow(text: str) -> bool:
            nonlocal seen
            seen += text.count("kv-eval: trajectory ")
            on_progress(min(seen, total), total, None)
            return False

        try:
            outcome = run(argv, log=log, env=env, timeout=bench.timeout, on_text=follow)
            found, fault = _read(outcome, out, bench)
        finally:
            out.unlink(missing_ok=True)
        state = output.parse_effective(output.contexts(outcome.text).get(pair, outcome.text))
        shown = ["kv-eval.bin" if word == str(out) else word for word in argv]
        info = run_of(outcome, shown, removed, bench, log)
        if fault is None:
            fault = judge.judge_state(cell, state)
        if fault is not None or found is None:
            return record_of(cell, info, bench, state, fault)
        return self._record(cell, found, bench, info, state)

    def _record(self, cell: Cell, found: KvEval, bench: Bench, info: Any, state: Effective) -> Record:
        parts = [Tokens.of(found.figures(1, t), found.figures(0, t)) for t in found.header.trajectories]
        tokens = parts[0]
        for part in parts[1:]:
            tokens = tokens.then(part)
        told = along(tokens, cell.chunks)
        if not (finite(told.kld.value) and np.isfinite(tokens.nll).all()):
            return record_of(cell, info, bench, state, ("nan", "a figure of a token is not finite"))
        flips = [flip for flip in told.flips if flip is not None]
        figures: dict[str, float | str] = {
            "trajectory_kld": round(told.kld.value, 9),
            "trajectory_same_pct": round(told.same_pct.value, 6),
            "trajectory_free_pct": round(told.free_pct, 6),
            "trajectory_flips": " ".join("-" if flip is None else str(flip) for flip in told.flips),
            "trajectory_length": told.length,
        }
        if cell.chunks > 1:
            figures["trajectory_kld_err"] = round(told.kld.error, 9)
        if flips:
            figures["trajectory_first_flip"] = float(statistics.median(flips))
        path = bench.store.tokens_path(cell)
        file = TokenFile(file=str(path.relative_to(bench.store.dir)), sha256=save(tokens, path))
        return record_of(cell, info, bench, state, None, figures=figures, tokens=file)

    def words(self, record: Record) -> str:
        told = record.figures
        return f"KLD {told['trajectory_kld']:.5f} along, {told['trajectory_free_pct']:.1f} % the same freely"


def _command(job: Job, bench: Bench, out: Any) -> tuple[str, list[str]]:
    """(the cache as llama-kv-eval is told of it, the command)."""
    cell = job.cell
    types = (cell.k, cell.v) if job.profile is None else ("f16", "f16")
    pair = kv_eval_pair(*types, job.anchor or "off", cell.window)
    if job.profile is not None:
        pair += f",profile={job.profile.resolve()}"
    argv = kv_eval_argv(
        cell,
        bench.build,
        model=job.model.path,
        corpus=job.corpus.path,
        threads=bench.threads,
        reference=_REFERENCE,
        pairs=[pair],
        chunks=0,
        first_chunk=0,
        one_token=0,
        out=out,
    )
    argv += ["--prompts", str(cell.chunks), "--trajectory", "greedy"]
    for seed in range(1, int(cell.options["seeds"]) + 1):
        argv += ["--trajectory", f"{cell.options['temperature']:g}:{seed}"]
    return pair, argv


def _read(outcome: Outcome, out: Any, bench: Bench) -> tuple[KvEval | None, judge.Fault | None]:
    short = output.text_too_short(outcome.text)
    if short:
        return None, ("short-corpus", short)
    tolerated = replace(outcome, returncode=0) if outcome.returncode == _SOME_PAIR else outcome
    fault = judge.judge_process(tolerated, bench.timeout)
    if fault is not None:
        return None, fault
    try:
        found = read_kv_eval(out)
    except TurboEvalError as error:
        return None, ("no-result", error.message)
    ran = found.runs[1]
    if ran.status == "ok":
        return found, None
    return None, ("crash" if ran.status == "failed" else ran.status, ran.detail)
