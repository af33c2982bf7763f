"""turbo-eval tune on a small random model: better than a pair on text it has not seen, resumed, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from tests.support.layouts import LAYERS, LAYOUTS, write_model
from turbo_eval.errors import RegressionError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.tune.run import Settings, Tuned, tune

pytestmark = pytest.mark.build

SETTINGS = Settings(3.25, None, ctx=256, chunks=2, recent=16, first=2, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_model(LAYOUTS["qwen2"], folder / "qwen2.gguf")
    return folder


def run(build: Build, prose: CorpusFile, folder: Path, settings: Settings) -> Tuned:
    model = resolve_model(str(folder / "qwen2.gguf"))
    return tune(model, prose, build, folder / "p.gguf", settings, lambda *step: None)


@pytest.fixture(scope="module")
def tuned(build: Build, prose: CorpusFile, folder: Path) -> Tuned:
    return run(build, prose, folder, SETTINGS)


def test_the_profile_beats_the_pair_of_as_many_bits(tuned: Tuned) -> None:
    cost = {row.name: row.kld.mean for row in tuned.rows}
    assert tuned.allocation.bits <= 3.25
    assert cost["p.gguf"] == tuned.held_out.mean
    assert cost["p.gguf"] < 0.8 * cost["turbo3/turbo3 + window"]
    assert cost["turbo4/turbo4 + window"] < cost["p.gguf"]
    assert cost["q8_0/q8_0"] < 0.1 * cost["p.gguf"]


def test_the_file_says_what_was_found(tuned: Tuned) -> None:
    said = {key: field.contents() for key, field in GGUFReader(tuned.path).fields.items()}
    assert tuple(said["kv_profile.type_k"]) == tuned.allocation.k
    assert tuple(said["kv_profile.type_v"]) == tuned.allocation.v
    assert said["kv_profile.kld.held_out"] == pytest.approx(tuned.held_out.mean)
    assert said["kv_profile.kld.predicted"] == pytest.approx(tuned.predicted)
    assert len(tuned.allocation.k) == LAYERS


def test_a_second_run_measures_nothing_again(
    build: Build, prose: CorpusFile, folder: Path, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **named: object) -> None:
        raise AssertionError("llama-perplexity ran again")

    monkeypatch.setattr("turbo_eval.tune.measure.run", never)
    again = run(build, prose, folder, SETTINGS)
    assert again.rows == tuned.rows


def test_the_fewest_bits_for_a_bound(build: Build, prose: CorpusFile, folder: Path, tuned: Tuned) -> None:
    bound = 1.5 * tuned.held_out.mean
    found = run(build, prose, folder, replace(SETTINGS, bits=None, max_kld=bound))
    assert found.held_out.mean <= bound
    assert found.allocation.bits <= 3.25


def test_a_bound_out_of_reach_names_the_nearest(build: Build, prose: CorpusFile, folder: Path) -> None:
    with pytest.raises(RegressionError, match=r"the nearest has 0\.\d+ at 8\.50 bits a value"):
        run(build, prose, folder, replace(SETTINGS, bits=None, max_kld=1e-9))
