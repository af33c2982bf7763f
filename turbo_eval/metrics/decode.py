"""The decode path: perplexity one token at a time against the batched run over the same chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from turbo_eval.llama import output
from turbo_eval.llama.tool import perplexity_argv
from turbo_eval.metrics import judge
from turbo_eval.metrics.base import Bench, Bound, Column, Extent, Job, Metric, OnProgress, Options, n
from turbo_eval.metrics.tool import execute, judged, record_of
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Decode, Record


class DecodeOptions(Options):
    """`chunks` of text through ubatch 1.

    Attributes:
        chunks: how many chunks; taken from the start of the corpus, as in the batched cell.
        bound_pct: largest allowed |PPL(ubatch 1) / PPL(batched) − 1|, in percent; more where the pair's
            KL divergence is on record and explains more.
            Any difference in rounding is amplified by the 8-bit quantization of activations: exact
            f16 caches differ by 1 to 2 % over 127 tokens, 0.2 % over 254 (SmolLM2, CPU).
    """

    chunks: n.Count = 2
    bound_pct: n.PositivePercent = 2.0


def _words(record: Record) -> str:
    assert record.decode is not None
    return f"decode path {abs(record.decode.delta_pct):.3f} % off the batched one"


class DecodePath(Metric):
    name = "decode"
    options = DecodeOptions
    per_token = True
    needs = ("ppl", "kld")
    columns = (Column("decode Δ %", lambda r: r.decode and r.decode.delta_pct, "{:+.2f}"),)
    bounds = (
        Bound(
            "max_decode_pct",
            n.PositivePercent,
            lambda r: abs(r.decode.delta_pct) if r.decode else None,
            _words,
            "no decode-path number is on record",
            unit=" %",
        ),
    )
    docs = "docs/explanation/method.md#the-decode-path"

    def lay_out(self, extent: Extent) -> dict[str, Any]:
        assert isinstance(extent.options, DecodeOptions)
        options = {"batched_ubatch": extent.ubatch, "batched_chunks": extent.chunks}
        return {
            "chunks": min(extent.options.chunks, extent.chunks),
            "ubatch": 1,
            "options": options | {"bound_pct": extent.options.bound_pct},
        }

    def references(self, cell: Cell) -> tuple[Cell, ...]:
        return cell.batched("ppl"), cell.batched("kld")

    def seconds(self, job: Job, threads: int) -> float:
        # each token reads all weights once
        return 2.0 + job.cell.ctx * job.cell.chunks * job.model.size / 6e9

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        cell = job.cell
        argv = perplexity_argv(
            cell,
            bench.build,
            model=job.model.path,
            corpus=job.corpus.path,
            threads=bench.threads,
            anchor=job.anchor,
            profile=job.profile,
        )
        outcome, run_info = execute(cell, argv, bench, bench.store.log_path(cell), on_progress)
        result, effective, fault = judged(cell, outcome, bench.timeout)
        decode: Decode | None = None
        if fault is None:
            decode, fault = compare(cell, result, references)
        return record_of(cell, run_info, bench, effective, fault, result, decode=decode)

    def words(self, record: Record) -> str:
        assert record.decode is not None
        batched = f"batched {record.decode.ppl_batched:.4f} ({record.decode.delta_pct:+.2f} %)"
        return f"{super().words(record)}, {batched}"


def allowed_pct(bound: float, kld: float, tokens: int) -> float:
    """Percent by which the perplexities of two paths may differ: `bound`, or what quantization explains.

    Another order of rounding flips codes, and the two caches drift apart as if each were noise of its
    own. A small KL divergence is half the variance of a token's log-probability against f16, so between
    the two it is 4·KLD; three standard errors of the mean over `tokens` tokens are allowed.
    """
    return max(bound, 100 * math.expm1(3 * math.sqrt(4 * max(kld, 0.0) / tokens)))


def compare(
    cell: Cell, result: output.PplText, references: Sequence[Record]
) -> tuple[Decode | None, judge.Fault | None]:
    """Perplexity through ubatch 1 against the batched run's after the same number of chunks."""
    batched = next((record for record in references if len(record.running_ppl) >= cell.chunks), None)
    if batched is None:
        return None, ("no-result", "there is no batched number of this pair to compare with")
    assert result.ppl is not None
    ppl_batched = batched.running_ppl[cell.chunks - 1]
    delta = 100 * (result.ppl / ppl_batched - 1)
    kld = next((record.kld.mean for record in references if record.kld), 0.0)
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
