"""The base of KL divergences is made under the lock of the cell that it is the log of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.golden import world
from tests.support.records import make_cell, provenance
from turbo_eval.inputs.corpora import resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import machine
from turbo_eval.metrics.base import Bench, Job
from turbo_eval.metrics.base_logits import BaseLogits
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.records.reference import exact_cell
from turbo_eval.records.store import Store


class AskedError(Exception):
    """The run would begin now."""


@pytest.mark.parametrize("pair", ["q8_0:turbo3", "f16:f16"])
def test_the_log_of_the_reference_is_written_under_its_lock(pair: str, tmp_path: Path) -> None:
    with world() as made:
        model, corpus = resolve_model(str(made.model)), resolve_corpus(str(made.corpus))
        build = Build.from_bin_dir(made.bin)
        cell = make_cell(pair, **{**made.cell(), "metric": "kld"})
        store = Store(tmp_path / "results", machine().id)
        bench = Bench(build, provenance(machine(), build.tree), store, 1, None)
        asked: list[Cell] = []

        def run(exact: Cell, argv: list[str], shown: list[str]) -> Record:
            asked.append(exact)
            with Store(tmp_path / "results", machine().id).lock(exact, wait=False) as held:
                assert not held, "another sweep could take the cell, and its log, now"
            raise AskedError

        with store.lock(cell, wait=False) as own, pytest.raises(AskedError):
            assert own
            BaseLogits(tmp_path / "logits", 2**30).ensure(Job(cell, model, corpus, "auto"), bench, run)
        assert asked == [exact_cell(cell)]
        with store.lock(exact_cell(cell), wait=False) as free:
            assert free
