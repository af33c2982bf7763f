"""A cell with its inputs: what a metric is given to measure."""

from __future__ import annotations

from dataclasses import dataclass

from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.records.record import Cell


@dataclass(frozen=True)
class Job:
    """A cell and where its inputs lie. `anchor` is the value for --kv-anchor, None: no flag.

    `writes_base`: the run also leaves the base that KL divergences of this sweep are taken against.
    """

    cell: Cell
    model: ModelFile
    corpus: CorpusFile
    anchor: str | None
    writes_base: bool = False
