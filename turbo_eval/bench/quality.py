"""A speed record beside the others: its name among them, and the quality of the same cache."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_eval.formats.window import Window
from turbo_eval.records.record import Record
from turbo_eval.records.reference import serves
from turbo_eval.records.speed import BenchRecord


def pair_label(record: BenchRecord, among: Sequence[BenchRecord]) -> str:
    """ "K/V" and its exact window, with the anchor where the pair is there with several."""
    window = Window(record.recent, record.first)
    anchors = {r.anchor for r in among if (r.k, r.v) == (record.k, record.v)}
    label = f"{record.k}/{record.v}" + (f" window {window}" if window else "")
    return label + (f" (anchor {record.anchor})" if len(anchors) > 1 else "")


def one_token(record: BenchRecord, among: Sequence[BenchRecord]) -> BenchRecord | None:
    """Of a draft: the step of a single token of the same cache at the same depth, which is plain decode."""
    if record.workload != "draft":
        return None
    own = _apart_from_size(record)
    return next((r for r in among if r.size == 1 and r.status == "ok" and _apart_from_size(r) == own), None)


def _apart_from_size(record: BenchRecord) -> tuple[object, ...]:
    cache = (record.k, record.v, record.anchor, record.recent, record.first, record.profile)
    place = (record.tree, record.backend, record.threads, record.env, record.provenance.machine.id)
    return record.workload, record.model_sha256, record.depth, *cache, *place


def quality(record: BenchRecord, known: Sequence[Record]) -> Record | None:
    """The quality record of the same model, pair, anchor, build, machine and environment, best with a KLD."""
    matching = [
        r
        for r in known
        if r.ok
        and r.cell.metric in ("kld", "ppl")
        and (r.cell.model_sha256, r.cell.k, r.cell.v) == (record.model_sha256, record.k, record.v)
        and (r.cell.recent, r.cell.first, r.cell.profile) == (record.recent, record.first, record.profile)
        and (r.cell.tree, r.cell.backend, r.cell.env) == (record.tree, record.backend, record.env)
        and r.machine == record.provenance.machine.id
        and (r.cell.anchor == record.anchor or (record.anchor in ("auto", "off") and serves(r)))
    ]
    return max(matching, key=lambda r: (r.cell.metric == "kld", r.cell.ctx * r.cell.chunks), default=None)


def quality_words(found: Record | None) -> str:
    """The figure of a quality record and the text it is of."""
    if found is None or found.ppl is None:
        return UNVERIFIED
    kld = f", KLD {found.kld.mean:z.5f} from f16/f16" if found.kld else ""
    return f"PPL {found.ppl:.4f}{kld} ({found.cell.corpus}, {found.cell.chunks} × {found.cell.ctx})"


UNVERIFIED = "fast, but unverified"
