"""Perplexity: a plain run of llama-perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_eval.llama.tool import perplexity_argv
from turbo_eval.metrics.base import Bench, Job, Metric, OnProgress
from turbo_eval.metrics.base_logits import BaseFailedError, BaseLogits
from turbo_eval.metrics.tool import conclude, exact_runner, execute
from turbo_eval.records.record import Record


class Perplexity(Metric):
    name = "ppl"
    batched = True
    per_token = True
    docs = "docs/explanation/method.md#perplexity"

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        if job.writes_base:
            try:
                _, record = BaseLogits.default().ensure(job, bench, exact_runner(bench, on_progress))
            except BaseFailedError as error:
                return error.record
            if record is not None:
                return record  # else the base is there from before, and only the figure is missing
        argv = perplexity_argv(
            job.cell,
            bench.build,
            model=job.model.path,
            corpus=job.corpus.path,
            threads=bench.threads,
            anchor=job.anchor,
            profile=job.profile,
        )
        outcome, run_info = execute(job.cell, argv, bench, bench.store.log_path(job.cell), on_progress)
        return conclude(job.cell, outcome, run_info, bench)
