"""Measure the cells of one comparison with llama-kv-eval: one process scores f16/f16 and all caches side by
side, and each cell still gets a record of its own, with the status that is its own.

A process that dies takes all its caches with it. It is then run again with half of them, until the cache that
kills it is alone: that one is a crash, the others have their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.evidence.kv_eval import EvalRun, KvEval, read_kv_eval
from turbo_eval.evidence.tokens import Tokens, numbers, save
from turbo_eval.formats.window import OFF
from turbo_eval.llama import output
from turbo_eval.llama.backends import backend
from turbo_eval.llama.tool import KV_EVAL, kv_eval_argv, kv_eval_pair
from turbo_eval.metrics import judge, metric, references
from turbo_eval.metrics.base import Bench, Job
from turbo_eval.metrics.decode import compare
from turbo_eval.metrics.tool import record_of, run_of
from turbo_eval.records.record import ByChunk, Effective, Kld, Record, TokenFile, finite
from turbo_eval.records.reference import candidates, comparison, is_exact, serves
from turbo_eval.sweep.begun import Begun
from turbo_eval.util.process import Outcome, child_environment, run

# As chunks are scored: the job, chunks done, chunks in all, its running perplexity, that of f16/f16.
OnJob = Callable[[Job, int, int | None, float | None, float | None], None]

REFERENCE = kv_eval_pair("f16", "f16", "off", OFF)


def together(jobs: Sequence[Job]) -> list[list[int]]:
    """The places of the jobs: those that one process measures together, in the order of their first."""
    found: dict[str, list[int]] = {}
    for place, job in enumerate(jobs):
        alone = job.cell.engine != "kv-eval"
        found.setdefault(f"{place}" if alone else f"{comparison(job.cell)} {job.model.path}", []).append(
            place
        )
    return list(found.values())


def measure_together(
    jobs: Sequence[Job], bench: Bench, on_progress: OnJob, *, sequential: bool = False
) -> Iterator[tuple[Job, Record]]:
    """The record of each job, which the caller puts on record before it takes the next.

    Args:
        jobs: of one comparison, see `together`.
        sequential: the number of chunks was decided by looking at figures.

    Raises:
        EnvironmentProblem: disk full, tool missing: nothing further could succeed.
        KeyboardInterrupt: after ending the process; nothing more is recorded.
    """
    begun = Begun(bench.store)
    for task in _tasks(jobs, begun):
        yield from _Pass(bench, begun, on_progress, sequential).run(task)


@dataclass(frozen=True)
class _Task:
    """What one process does: `done` chunks are on file already; `chunks` in all, 0: decode cells alone."""

    caches: dict[str, tuple[Job, ...]]
    of_reference: tuple[Job, ...]
    done: int
    chunks: int
    one_token: int

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.of_reference, *(job for jobs in self.caches.values() for job in jobs))

    def halves(self) -> tuple[_Task, _Task]:
        items = list(self.caches.items())
        half = len(items) // 2
        return (
            replace(self, caches=dict(items[:half])),
            replace(self, caches=dict(items[half:]), of_reference=()),
        )


def _cache(job: Job) -> str:
    return kv_eval_pair(job.cell.k, job.cell.v, job.anchor or "off", job.cell.window)


def _served_by_reference(job: Job) -> bool:
    """Where a second context may differ, the KL divergence of f16/f16 from itself is measured in one: that is
    the noise floor."""
    return is_exact(job.cell) and (job.cell.metric != "kld" or backend(job.cell.backend).repeats)


def _tasks(jobs: Sequence[Job], begun: Begun) -> list[_Task]:
    """One process for what starts at the first chunk; others for what goes on from chunks on file, and for
    decode cells of caches whose batched figures are there."""
    batched = [job for job in jobs if job.cell.metric != "decode"]
    decode = [job for job in jobs if job.cell.metric == "decode"]
    done = {job.cell.key(): begun.chunks(job.cell) for job in batched}
    starts = sorted({done[job.cell.key()] for job in batched if not _served_by_reference(job)}) or [0]
    tasks = []
    for start in starts:
        own = [j for j in batched if not _served_by_reference(j) and done[j.cell.key()] == start]
        reference = [j for j in batched if _served_by_reference(j)] if start == starts[0] else []
        if start == 0 and own:
            caches = {_cache(job) for job in own}
            own += [j for j in decode if not _served_by_reference(j) and _cache(j) in caches]
            reference += [j for j in decode if _served_by_reference(j)]
        chosen = {id(job) for job in (*own, *reference)}
        decode = [job for job in decode if id(job) not in chosen]
        chunks = max((job.cell.chunks for job in batched), default=0)
        tasks.append(_task(own, reference, start, chunks))
    if decode:
        of_reference = [job for job in decode if _served_by_reference(job)]
        tasks.append(_task([j for j in decode if not _served_by_reference(j)], of_reference, 0, 0))
    return [task for task in tasks if task.jobs]


def _task(own: Sequence[Job], reference: Sequence[Job], done: int, chunks: int) -> _Task:
    caches: dict[str, tuple[Job, ...]] = {}
    for job in own:
        caches[_cache(job)] = (*caches.get(_cache(job), ()), job)
    every = (*own, *reference)
    one_token = max((job.cell.chunks for job in every if job.cell.metric == "decode"), default=0)
    return _Task(caches, tuple(reference), done, chunks, one_token)


class _Pass:
    """Runs tasks and makes records of what comes out."""

    def __init__(self, bench: Bench, begun: Begun, on_progress: OnJob, sequential: bool) -> None:
        self.bench, self.begun, self.sequential = bench, begun, sequential
        self._on_progress = on_progress

    def run(self, task: _Task) -> Iterator[tuple[Job, Record]]:
        if not task.caches:
            yield from self._alone(task)
            return
        out = self.bench.store.log_path(task.jobs[0].cell).with_suffix(".part")
        try:
            outcome, argv = self._execute(task, out)
            fault = _fault_of_all(outcome)
            if fault is None and _died(outcome):
                if len(task.caches) > 1:
                    for half in task.halves():
                        yield from self.run(half)
                    return
                # f16/f16 is not known to be at fault
                yield from self._failed(
                    replace(task, of_reference=()), outcome, argv, _why(outcome, self.bench)
                )
                yield from self._alone(replace(task, caches={}))
                return
            if fault is not None:
                yield from self._failed(task, outcome, argv, fault)
                return
            found = read_kv_eval(out)
        finally:
            out.unlink(missing_ok=True)
        yield from self._records(task, outcome, argv, found)

    def _alone(self, task: _Task) -> Iterator[tuple[Job, Record]]:
        """Cells of f16/f16 with nothing to compare: a second context would be for nothing."""
        for job in task.of_reference:
            if job.cell.metric != "ppl":
                chunks = (0, job.cell.chunks) if job.cell.metric == "decode" else (job.cell.chunks, 0)
                yield from self.run(_Task({_cache(job): (job,)}, (), 0, *chunks))
                continue
            plain = replace(job, cell=job.cell.model_copy(update={"engine": "llama-perplexity"}))

            def follow(chunk: int, total: int | None, ppl: float | None, job: Job = job) -> None:
                self._on_progress(job, chunk, total, ppl, None)

            yield job, metric(plain.cell.metric).measure(plain, self.bench, follow, ())

    # -- the process ------------------------------------------------------------------------------

    def _execute(self, task: _Task, out: Path) -> tuple[Outcome, list[str]]:
        job, bench = task.jobs[0], self.bench
        argv = kv_eval_argv(
            job.cell.batched("ppl"),
            bench.build,
            model=job.model.path,
            corpus=job.corpus.path,
            threads=bench.threads,
            reference=REFERENCE,
            pairs=list(task.caches),
            chunks=max(task.chunks - task.done, 0),
            first_chunk=task.done,
            one_token=task.one_token,
            out=out,
        )
        limit = bench.timeout and bench.timeout * len(task.jobs)
        env, _ = child_environment()
        log = bench.store.log_path(job.cell)
        outcome = run(argv, log=log, env=env, timeout=limit, on_text=self._follow(task))
        return outcome, ["kv-eval.bin" if word == str(out) else word for word in argv]

    def _follow(self, task: _Task) -> Callable[[str], bool]:
        rest = ""

        def follow(text: str) -> bool:
            nonlocal rest
            whole, newline, rest = (rest + text).rpartition("\n")
            for line in output.scored(whole + newline):
                for job in task.jobs:
                    if (job.cell.metric == "decode") == line.one_token:
                        done = 0 if line.one_token else task.done
                        own = REFERENCE if job in task.of_reference else _cache(job)
                        base = line.ppl.get(REFERENCE) if own != REFERENCE else None
                        ppl = line.ppl.get(own)
                        self._on_progress(job, line.chunk + done, line.total + done, ppl, base)
            return False

        return follow

    # -- the records ------------------------------------------------------------------------------

    def _failed(
        self, task: _Task, outcome: Outcome, argv: list[str], fault: judge.Fault
    ) -> Iterator[tuple[Job, Record]]:
        """Nothing was measured. What f16/f16 failed by is not the other caches' own fault."""
        states = output.contexts(outcome.text)
        for job in task.jobs:
            own, ours = fault, states.get(_cache(job), outcome.text)
            if outcome.returncode == _REFERENCE_ODD and not is_exact(job.cell):
                own = ("base-invalid", f"the f16/f16 run to compare with failed ({fault[0]}: {fault[1]})")
            state = output.parse_effective(ours)
            yield (
                job,
                record_of(job.cell, self._run_info(task, job, outcome, argv, ours), self.bench, state, own),
            )

    def _run_info(self, task: _Task, job: Job, outcome: Outcome, argv: list[str], said: str) -> Any:
        removed = child_environment()[1]
        log, cells = self.bench.store.log_path(job.cell), len(task.jobs)
        log.write_text(said, encoding="utf-8")  # in place: the lock is on this file
        shared = {
            "cells": cells,
            "seconds": outcome.seconds / cells,
            "cpu_seconds": outcome.cpu_seconds / cells,
        }
        shared = {name: round(value, 3) for name, value in shared.items()}
        return run_of(outcome, argv, removed, self.bench, log).model_copy(update=shared)

    def _records(
        self, task: _Task, outcome: Outcome, argv: list[str], found: KvEval
    ) -> Iterator[tuple[Job, Record]]:
        states = output.contexts(outcome.text)
        numbered = {REFERENCE: 0} | {cache: n for n, cache in enumerate(task.caches, start=1)}
        moved = self._moved(task, found)
        for job in sorted(task.jobs, key=lambda job: job.cell.metric == "decode"):
            cache = REFERENCE if job in task.of_reference else _cache(job)
            place = 0 if job in task.of_reference else numbered[cache]
            said = states.get(cache, outcome.text)
            state = output.parse_effective(said)
            info = self._run_info(task, job, outcome, argv, said)
            ran = found.runs[place]
            fault = judge.judge_state(job.cell, state) if ran.status != "refused" else None
            fault = fault or _fault_of(ran) or moved
            if fault is not None:
                yield job, record_of(job.cell, info, self.bench, state, fault)
            elif job.cell.metric == "decode":
                yield job, self._decode(job, found, place, info, state)
            else:
                yield job, self._batched(job, task, found, place, info, state)

    def _batched(
        self, job: Job, task: _Task, found: KvEval, place: int, info: Any, state: Effective
    ) -> Record:
        tokens = Tokens.of(found.figures(place), found.figures(0))
        if task.done:
            tokens = self.begun.tokens(job.cell, task.done, reference=place == 0).then(tokens)
        values = numbers(tokens)
        if not all(finite(x) for x in (values["ppl"], *values["running_ppl"], values["kld"]["mean"])):
            odd = f"perplexity is {values['ppl']}, KL divergence {values['kld']['mean']}"
            return record_of(job.cell, info, self.bench, state, ("nan", odd))
        result = _ppl(values, tokens)
        store = self.bench.store
        path = store.tokens_path(job.cell)
        figures: dict[str, Any] = {
            "by_chunk": ByChunk(**values["by_chunk"], sequential=self.sequential),
            "tokens": TokenFile(file=str(path.relative_to(store.dir)), sha256=save(tokens, path)),
        }
        if job.cell.metric == "kld":
            figures["kld"] = Kld(**values["kld"])
        return record_of(job.cell, info, self.bench, state, None, result, **figures)

    def _decode(self, job: Job, found: KvEval, place: int, info: Any, state: Effective) -> Record:
        own = found.figures(place, "one-token")
        tokens = Tokens.of(own, own).first(job.cell.chunks)
        values = numbers(tokens)
        result = _ppl(values, tokens)
        records = (self.bench.store.load(cell) for cell in references(job.cell))
        decode, fault = compare(job.cell, result, [r for r in records if r is not None and r.ok])
        return record_of(job.cell, info, self.bench, state, fault, result, decode=decode)

    def _moved(self, task: _Task, found: KvEval) -> judge.Fault | None:
        """f16/f16 is measured again beside what was missing: is it still what is on record?"""
        if any(job.cell.metric != "decode" for job in task.of_reference) or task.chunks == 0 or task.done:
            return None
        places = candidates(task.jobs[0].cell.batched("ppl"))
        known = next((r for cell in places if (r := self.bench.store.load(cell)) and serves(r)), None)
        if known is None or known.ppl is None:
            return None
        now = numbers(Tokens.of(found.figures(0), found.figures(0)))["ppl"]
        allowed = _SAME if known.run.threads == self.bench.threads else _OTHER_THREADS
        if abs(now / known.ppl - 1) <= allowed:
            return None
        return "base-invalid", (
            f"f16/f16 has a perplexity of {now:.4f} now and of {known.ppl:.4f} on record: something changed"
            " that records do not name; measure all of it again (--fresh)"
        )


# How far f16/f16 may be from what is on record: the digits that are printed, and the order of rounding.
_SAME, _OTHER_THREADS = 2e-5, 1e-2

# Exit codes of llama-kv-eval (tools/kv-eval/README.md in the patched tree).
_REQUEST, _CANNOT_RUN, _SOME_PAIR, _REFERENCE_ODD = 1, 2, 3, 4


def _ppl(values: dict[str, Any], tokens: Tokens) -> output.PplText:
    return output.PplText(values["ppl"], values["ppl_err"], tuple(values["running_ppl"]), tokens.chunks, None)


def _fault_of_all(outcome: Outcome) -> judge.Fault | None:
    """What no other choice of caches would mend.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    short = output.text_too_short(outcome.text)
    if outcome.returncode == _REQUEST and short:
        return "short-corpus", short
    if outcome.returncode == _REFERENCE_ODD:
        return "nan", output.last_error(outcome.text) or "the logits of f16/f16 are not finite"
    if outcome.returncode == _CANNOT_RUN and not output.memory_too_small(outcome.text):
        why = output.last_error(outcome.text) or f"{KV_EVAL} gave no reason"
        if "cannot write to" in why:
            raise EnvironmentProblem(why, "free some space")
        return judge.judge_process(outcome, None) or ("crash", why)
    return None


def _died(outcome: Outcome) -> bool:
    return outcome.returncode not in (0, _SOME_PAIR)


def _why(outcome: Outcome, bench: Bench) -> judge.Fault:
    """Of the one cache that the process had."""
    memory = output.memory_too_small(outcome.text)
    if memory is not None:
        return "refused", f'{memory}; engine = "llama-perplexity" needs one context only'
    return judge.judge_process(outcome, bench.timeout) or ("crash", "it ended without a result")


def _fault_of(ran: EvalRun) -> judge.Fault | None:
    """What llama-kv-eval says of a cache that it could not evaluate to the end."""
    if ran.status == "failed":
        return "crash", ran.detail
    return None if ran.status == "ok" else (ran.status, ran.detail)
