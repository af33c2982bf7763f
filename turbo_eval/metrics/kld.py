"""KL divergence from the f16/f16 run of the same text, in nats, and what is printed beside it."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_eval.llama import output
from turbo_eval.llama.tool import perplexity_argv
from turbo_eval.metrics.base import Bench, Bound, Column, Job, Metric, OnProgress, n
from turbo_eval.metrics.base_logits import BaseFailedError, BaseLogits
from turbo_eval.metrics.tool import exact_runner, execute, judged, record_of
from turbo_eval.records.record import Effective, Record


def _words(record: Record) -> str:
    assert record.kld is not None
    doubt = f" ± {record.kld.mean_err:.6f}" if record.kld.mean_err is not None else ""
    return f"KL divergence {record.kld.mean:.6f}{doubt} from f16/f16"


def _same_top_words(record: Record) -> str:
    assert record.kld is not None
    return f"same top token {record.kld.same_top_pct:.3f} %"


class KlDivergence(Metric):
    name = "kld"
    batched = True
    per_token = True
    covers = ("ppl",)
    columns = (
        Column("KLD", lambda r: r.kld and r.kld.mean, "{:z.5f}"),
        Column("± KLD", lambda r: r.kld and r.kld.mean_err, "{:z.5f}"),
        Column("KLD 99 %", lambda r: r.kld and r.kld.p99, "{:.4f}"),
        Column("same top %", lambda r: r.kld and r.kld.same_top_pct, "{:.2f}"),
    )
    bounds = (
        Bound(
            "max_kld",
            n.Nats,
            lambda r: r.kld.mean if r.kld else None,
            _words,
            "no KL divergence is on record",
        ),
        Bound(
            "min_same_top_pct",
            n.SharePct,
            lambda r: r.kld.same_top_pct if r.kld else None,
            _same_top_words,
            "no KL divergence is on record",
            unit=" %",
            upper=False,
        ),
    )
    docs = "docs/explanation/method.md#kl-divergence"

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        cell = job.cell
        try:
            base, _ = BaseLogits.default().ensure(job, bench, exact_runner(bench, on_progress))
        except BaseFailedError as error:
            failed = error.record
            why = f"the f16/f16 run to compare with failed ({failed.status}: {failed.detail})"
            return record_of(cell, failed.run, bench, Effective(), ("base-invalid", why))
        argv = perplexity_argv(
            cell,
            bench.build,
            model=job.model.path,
            corpus=job.corpus.path,
            threads=bench.threads,
            anchor=job.anchor,
            profile=job.profile,
            logits_base=base,
        )
        outcome, run_info = execute(cell, argv, bench, bench.store.log_path(cell), on_progress)
        result, effective, fault = judged(cell, outcome, bench.timeout)
        if fault is None and result.kld is None:
            fault = ("base-invalid", output.last_error(outcome.text) or "no KL statistics were printed")
        kld = {} if fault else {"kld": result.kld}
        return record_of(cell, run_info, bench, effective, fault, result, **kld)

    def words(self, record: Record) -> str:
        return super().words(record) + (f", KLD {record.kld.mean:z.5f}" if record.kld else "")
