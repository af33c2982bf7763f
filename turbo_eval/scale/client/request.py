"""What a job asks of a worker, and whether what comes back answers it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from turbo_eval.metrics.base import Job
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.scale.wire import Measure, Need, Source
from turbo_eval.sweep.spec import SweepSpec


def needs_of(job: Job) -> tuple[Need, ...]:
    """The files of a job."""
    cell = job.cell
    needs = [
        Need(kind="model", name=cell.model, sha256=cell.model_sha256, size=job.model.size),
        Need(kind="corpus", name=cell.corpus, sha256=cell.corpus_sha256, size=job.corpus.size),
    ]
    if cell.anchor_sha256:
        path = Path(cell.anchor)
        needs.append(Need(kind="anchor", name=path.name, sha256=cell.anchor_sha256, size=path.stat().st_size))
    if job.profile is not None and cell.profile is not None:
        size = job.profile.stat().st_size
        needs.append(Need(kind="profile", name=job.profile.name, sha256=cell.profile.sha256, size=size))
    return tuple(needs)


def memory_gib(job: Job) -> float:
    """Least device memory of a cell: weights and KV cache (compute buffers come on top)."""
    info, cell = job.model.gguf, job.cell
    tokens = max([cell.ctx, *cell.options.get("lengths", ())])
    values = tokens * info.n_layer * info.n_head_kv * (info.head_dim_k + info.head_dim_v)
    return float(job.model.size + 2 * values) / 2**30


def measure_request(
    job: Job, spec: SweepSpec, source: Source, needs: tuple[Need, ...], references: tuple[Record, ...]
) -> Measure:
    """The request for a cell; its ticket is still to be written on it."""
    return Measure(
        ticket="",
        cell=job.cell,
        source=source,
        needs=needs,
        anchor=_anchor(job),
        threads=spec.threads,
        timeout=spec.timeout,
        references=references,
    )


def fault_of(record: Record, cell: Cell, machine: str) -> str | None:
    """What makes a record none of what was asked for: `cell`, on `machine`."""
    if record.cell != cell or record.key != cell.key():
        return "its record is of another cell"
    if record.machine != machine:
        return f"its record is of machine {record.machine}, the comparison is on {machine}"
    if record.provenance.tree != cell.tree:
        return f"its record is of tree {record.provenance.tree[:12]}"
    return None


def _anchor(job: Job) -> Literal["auto", "on", "off", "file"] | None:
    """What --kv-anchor gets; a file goes by content, its path here means nothing there."""
    if job.anchor is None:
        return None
    modes: dict[str, Literal["auto", "on", "off"]] = {"auto": "auto", "on": "on", "off": "off"}
    return modes.get(job.anchor, "file")


def progress_of(message: dict[str, object]) -> tuple[int, int | None, float | None]:
    """Chunks done, chunks in all, running perplexity; what a worker says is not believed blindly."""
    chunk, total, ppl = (message.get(name) for name in ("chunk", "total", "ppl"))
    return (
        chunk if isinstance(chunk, int) else 0,
        total if isinstance(total, int) else None,
        ppl if isinstance(ppl, float) else None,
    )
