"""Perplexity, KL divergence and the decode path: everything llama-perplexity measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.llama import output
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import perplexity_argv
from turbo_eval.metrics import judge
from turbo_eval.metrics.base_logits import BaseFailedError, BaseLogits
from turbo_eval.metrics.job import Job
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Cell, Decode, Effective, Record, Run, finite
from turbo_eval.records.reference import references
from turbo_eval.records.store import Store
from turbo_eval.util.process import Outcome, child_environment, relevant_environment, run

# Called as work goes on: chunks done, chunks in all, running perplexity.
OnProgress = Callable[[int, int | None, float | None], None]


@dataclass(frozen=True)
class Bench:
    """What every measurement needs beside its job."""

    build: Build
    provenance: Provenance
    store: Store
    threads: int
    timeout: float | None


def measure(job: Job, bench: Bench, on_progress: OnProgress) -> Record:
    """Run a "ppl", "kld" or "decode" cell and judge it.

    Raises:
        EnvironmentProblem: disk full, tool missing, base logits over the cap.
        KeyboardInterrupt: after ending the process; nothing is recorded.
    """
    cell = job.cell

    def run_exact(exact: Cell, argv: list[str], shown: list[str]) -> Record:
        outcome, info = execute(exact, argv, bench, bench.store.log_path(exact), on_progress)
        return conclude(exact, outcome, info.model_copy(update={"argv": tuple(shown)}), bench)

    if job.writes_base:
        try:
            _, record = BaseLogits.default().ensure(job, bench, run_exact)
        except BaseFailedError as error:
            return error.record
        if record is not None:
            return record  # else the base is there from before, and only the figure is missing
    base: Path | None = None
    if cell.metric == "kld":
        try:
            base, _ = BaseLogits.default().ensure(job, bench, run_exact)
        except BaseFailedError as error:
            failed = error.record
            verdict: judge.Verdict = (
                "base-invalid",
                f"the f16/f16 run to compare with failed ({failed.status}: {failed.detail})",
            )
            return _record(cell, verdict, Effective(), failed.run, bench)
    argv = perplexity_argv(
        cell,
        bench.build,
        model=job.model.path,
        corpus=job.corpus.path,
        threads=bench.threads,
        anchor=job.anchor,
        logits_base=base,
    )
    outcome, run_info = execute(cell, argv, bench, bench.store.log_path(cell), on_progress)
    return conclude(cell, outcome, run_info, bench)


def execute(
    cell: Cell, argv: list[str], bench: Bench, log: Path, on_progress: OnProgress
) -> tuple[Outcome, Run]:
    """Run llama-perplexity, following its progress; hopeless runs are ended early.

    Hopeless: what runs is not what was asked for, or the running perplexity is no number any more.
    llama.cpp without our patches can lose the last lines of its log as it exits, and with them the
    figures: a run that ended well but said none is run once more.
    """
    env, removed = child_environment()
    outcome = _follow(cell, argv, env, bench, log, on_progress)
    if outcome.returncode == 0 and not outcome.stopped and output.lost_its_end(outcome.text):
        outcome = _follow(cell, argv, env, bench, log, on_progress)
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
        log=str(log.relative_to(bench.store.root)) if log.is_relative_to(bench.store.root) else log.name,
    )
    return outcome, info


def _follow(
    cell: Cell, argv: list[str], env: dict[str, str], bench: Bench, log: Path, on_progress: OnProgress
) -> Outcome:
    scanner = output.ProgressScanner()
    seen: list[str] = []

    def follow(text: str) -> bool:
        if scanner.total is None:
            seen.append(text)
        if not scanner.feed(text):
            return False
        on_progress(scanner.chunk, scanner.total, scanner.ppl)
        if seen:  # the start-up lines are complete
            state = output.parse_effective("".join(seen))
            seen.clear()
            return judge.judge_state(cell, state) is not None
        return scanner.ppl is not None and not finite(scanner.ppl)

    return run(argv, log=log, env=env, timeout=bench.timeout, on_text=follow)


def conclude(cell: Cell, outcome: Outcome, run_info: Run, bench: Bench) -> Record:
    """Text → record: process, then state, then numbers; the first fault is the status."""
    result = output.parse_ppl(outcome.text)
    effective = output.parse_effective(outcome.text)
    verdict = (
        judge.judge_process(outcome, bench.timeout)
        or judge.judge_state(cell, effective)
        or judge.judge_numbers(cell, outcome.text, result)
    )
    if verdict is None and cell.metric == "kld" and result.kld is None:
        verdict = ("base-invalid", output.last_error(outcome.text) or "no KL statistics were printed")
    decode: Decode | None = None
    if verdict is None and cell.metric == "decode":
        decode, verdict = _compare_decode(cell, result, bench.store)
    if verdict is not None:
        return _record(cell, verdict, effective, run_info, bench, decode=decode)
    return Record(
        key=cell.key(),
        cell=cell,
        status="ok",
        ppl=result.ppl,
        ppl_err=result.ppl_err,
        running_ppl=result.running,
        kld=result.kld if cell.metric == "kld" else None,
        decode=decode,
        effective=effective,
        run=run_info,
        provenance=bench.provenance,
    )


def allowed_pct(bound: float, kld: float, tokens: int) -> float:
    """Percent by which the perplexities of two paths may differ: `bound`, or what quantization explains.

    Another order of rounding flips codes, and the two caches drift apart as if each were noise of its
    own. A small KL divergence is half the variance of a token's log-probability against f16, so between
    the two it is 4·KLD; three standard errors of the mean over `tokens` tokens are allowed.
    """
    return max(bound, 100 * math.expm1(3 * math.sqrt(4 * max(kld, 0.0) / tokens)))


def _record(
    cell: Cell,
    verdict: judge.Verdict,
    effective: Effective,
    run_info: Run,
    bench: Bench,
    decode: Decode | None = None,
) -> Record:
    return Record(
        key=cell.key(),
        cell=cell,
        status=verdict[0],
        detail=verdict[1],
        decode=decode,
        effective=effective,
        run=run_info,
        provenance=bench.provenance,
    )


def _compare_decode(
    cell: Cell, result: output.PplText, store: Store
) -> tuple[Decode | None, judge.Verdict | None]:
    """Perplexity through ubatch 1 against the batched run's after the same number of chunks."""
    found = [record for reference in references(cell) if (record := store.load(reference)) and record.ok]
    batched = next((record for record in found if len(record.running_ppl) >= cell.chunks), None)
    if batched is None:
        return None, ("no-result", "there is no batched number of this pair to compare with")
    assert result.ppl is not None
    ppl_batched = batched.running_ppl[cell.chunks - 1]
    delta = 100 * (result.ppl / ppl_batched - 1)
    kld = next((record.kld.mean for record in found if record.kld), 0.0)
    scored = cell.chunks * (cell.ctx // 2 - 1)
    bound = round(allowed_pct(float(cell.options["bound_pct"]), kld, scored), 4)
    decode = Decode(
        ppl_batched=ppl_batched, delta_pct=round(delta, 4), bound_pct=bound, batched_key=batched.key
    )
    if abs(delta) > bound:
        return decode, (
            "decode-mismatch",
            f"perplexity one token at a time is {result.ppl:.4f}, batched {ppl_batched:.4f}"
            f" ({delta:+.2f} %, allowed {bound:g} %)",
        )
    return decode, None
