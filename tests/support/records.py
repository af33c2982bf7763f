"""Records for tests of what reads them: the shape of real ones, numbers as the test needs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from turbo_eval.evidence.tokens import Tokens, save
from turbo_eval.formats.cache_types import kv_mib
from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Machine, Provenance
from turbo_eval.records.record import ByChunk, Decode, Effective, Kld, Record, Run, TokenFile

MACHINE = Machine(id="test-2c", cpu="test", features=("avx2",), cores=2, memory_gib=8.0, os="Linux")


def provenance(machine: Machine = MACHINE, tree: str = "a" * 40) -> Provenance:
    return Provenance(
        backend="cpu",
        pin="0c1e5709",
        series="",
        tree=tree,
        dirty=False,
        compiler="cc 12",
        flags=(),
        machine=machine,
        packages={},
        harness="0.1.0",
    )


def make_cell(pair: str = "f16:f16", **changes: Any) -> Cell:
    k, v = pair.split(":")
    values: dict[str, Any] = {
        "metric": "ppl",
        "model": "tiny",
        "model_sha256": "1" * 64,
        "corpus": "prose",
        "corpus_sha256": "2" * 64,
        "k": k,
        "v": v,
        "ctx": 512,
        "chunks": 4,
        "batch": 512,
        "ubatch": 512,
        "backend": "cpu",
        "tree": "a" * 40,
    }
    return Cell(**{**values, **changes})


def make_kld(mean: float, same_top_pct: float = 99.0) -> Kld:
    return Kld(
        mean=mean,
        mean_err=mean / 20,
        median=mean / 2,
        p90=2 * mean,
        p99=5 * mean,
        p999=10 * mean,
        max=20 * mean,
        ppl_base=10,
        ppl_base_err=0.1,
        ln_ratio=0.01,
        ln_ratio_err=0.001,
        ratio=1.01,
        ratio_err=0.001,
        rms_dp_pct=1,
        rms_dp_pct_err=0.1,
        same_top_pct=same_top_pct,
        same_top_pct_err=0.1,
    )


def make_chunks(log_ratio: Sequence[float], *, sequential: bool = False) -> ByChunk:
    """Figures by chunk of a cache whose ln(PPL / PPL of f16/f16) in each chunk is given."""
    base = [2.3 + 0.1 * (i % 3) for i in range(len(log_ratio))]
    return ByChunk(
        nll=tuple(x + y for x, y in zip(base, log_ratio, strict=True)),
        base_nll=tuple(base),
        kld=tuple(abs(x) / 2 for x in log_ratio),
        same_top=(0.9,) * len(base),
        lost=3,
        won=2,
        scored=255 * len(base),
        sequential=sequential,
    )


def make_record(
    pair: str = "f16:f16",
    ppl: float | None = 10.0,
    *,
    status: str = "ok",
    detail: str = "",
    kld: Kld | None = None,
    decode: Decode | None = None,
    by_chunk: ByChunk | None = None,
    machine: Machine = MACHINE,
    **cell: Any,
) -> Record:
    if by_chunk is not None:
        ppl = _running(by_chunk)[-1]
    asked = make_cell(pair, **({"metric": "kld"} if kld else {}), **cell)
    k, v = (asked.k, asked.v) if asked.profile is None else ("q4_0", "q4_0")  # roughly
    size = kv_mib(k, v, n_layer=30, n_head_kv=3, dim_k=64, dim_v=64, ctx=asked.ctx)
    return Record.model_validate(
        {
            "key": asked.key(),
            "cell": asked,
            "status": status,
            "detail": detail,
            "ppl": ppl if status == "ok" else None,
            "ppl_err": 0.1 if status == "ok" and ppl else None,
            "running_ppl": _running(by_chunk) if by_chunk else (),
            "by_chunk": by_chunk,
            "kld": kld,
            "decode": decode,
            "effective": Effective(k=asked.k, v=asked.v, kv_mib=round(size, 2)),
            "run": Run(
                argv=("llama-perplexity",),
                env={},
                env_removed=(),
                started="2026-01-01T00:00:00+00:00",
                seconds=1.0,
                cpu_seconds=1.0,
                peak_mib=1.0,
                returncode=0,
                threads=2,
                log="test.log",
            ),
            "provenance": provenance(machine, asked.tree),
        }
    )


def _running(by_chunk: ByChunk) -> tuple[float, ...]:
    sums = accumulate(by_chunk.nll)
    return tuple(math.exp(total / n) for n, total in enumerate(sums, start=1))


def with_tokens(record: Record, folder: Path, *, growth: float = 1.0, seed: int = 1) -> Record:
    """The record with a file of figures of each token beside it, in `folder`.

    Args:
        growth: KL divergence at the end of a chunk over that at its start.
    """
    assert record.kld is not None
    chunks, scored = record.cell.chunks, record.cell.ctx // 2 - 1
    noise = np.random.default_rng(seed).gamma(4, 0.25, (chunks, scored))
    kld = (record.kld.mean * noise * np.linspace(1, growth, scored)).astype(np.float32)
    token = np.zeros((chunks, scored), np.uint32)
    base = np.full((chunks, scored), 2.3, np.float32)
    path = folder / "tokens" / f"{record.key}.npz"
    digest = save(Tokens(token, base + kld, token, kld, kld, base, token), path)
    return record.model_copy(update={"tokens": TokenFile(file=f"tokens/{path.name}", sha256=digest)})
