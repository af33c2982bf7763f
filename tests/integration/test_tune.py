"""turbo-eval tune on a small random model: better than a pair on text it has not seen, resumed, refused."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from tests.support.harness import Cli, one_sentence
from tests.support.layouts import LAYERS, LAYOUTS, write_model
from turbo_eval.analysis.figures import save, tuning_figure
from turbo_eval.errors import RegressionError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.tune.measure import Extent
from turbo_eval.tune.prepare import Plan, work
from turbo_eval.tune.run import Goal, Tuned, tune

pytestmark = pytest.mark.build

PLAN = Plan(Extent(256, 2), recent=16, first=2, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_model(LAYOUTS["qwen2"], folder / "qwen2.gguf")
    return folder


def run(build: Build, prose: CorpusFile, folder: Path, goal: Goal, plan: Plan = PLAN) -> Tuned:
    model = resolve_model(str(folder / "qwen2.gguf"))
    shares: list[float] = []
    done = tune(model, prose, build, folder / "p.gguf", plan, goal, lambda share, what: shares.append(share))
    assert shares == sorted(shares) and shares[-1] <= 1
    return done


@pytest.fixture(scope="module")
def tuned(build: Build, prose: CorpusFile, folder: Path) -> Tuned:
    return run(build, prose, folder, Goal(3.25))


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
        raise AssertionError("llama-kv-eval ran again")

    monkeypatch.setattr("turbo_eval.tune.measure.run", never)
    again = run(build, prose, folder, Goal(3.25))
    assert again.rows == tuned.rows


def test_the_fewest_bits_for_a_bound(build: Build, prose: CorpusFile, folder: Path, tuned: Tuned) -> None:
    bound = 1.5 * tuned.held_out.mean
    found = run(build, prose, folder, Goal(max_kld=bound))
    assert found.held_out.mean <= bound
    assert found.allocation.bits <= 3.25


def test_a_bound_out_of_reach_names_the_nearest(build: Build, prose: CorpusFile, folder: Path) -> None:
    with pytest.raises(RegressionError, match=r"the nearest has 0\.\d+ at 8\.50 bits a value"):
        run(build, prose, folder, Goal(max_kld=1e-9))


def test_exit_codes_on_both_sides_of_what_can_be_reached(
    build: Build, prose: CorpusFile, folder: Path, tmp_path: Path
) -> None:
    cli, out = Cli(tmp_path, build.bin_dir), tmp_path / "p.gguf"
    shared: list[str | Path] = [
        "tune",
        folder / "qwen2.gguf",
        "--corpus",
        prose.path,
        "--ctx",
        "256",
        "--chunks",
        "1",
    ]
    shared += ["--threads", "1", "--bin-dir", build.bin_dir, "--out", out, "--max-kld"]

    def within(bound: float) -> subprocess.CompletedProcess[str]:
        return cli.run(*shared, f"{bound:.9f}")

    least = re.search(r"the nearest has (0\.\d+) at", within(1e-9).stderr)
    assert least is not None
    tighter = within(0.9 * float(least[1]))
    assert tighter.returncode == 1 and one_sentence(tighter.stderr)
    assert f"the nearest has {least[1]} at" in tighter.stderr and not out.exists()
    met = within(1.1 * float(least[1]))
    assert met.returncode == 0, met.stderr
    held_out = GGUFReader(out).fields["kv_profile.kld.held_out"].contents()
    assert held_out <= 1.1 * float(least[1])


def test_a_bound_on_perplexity(build: Build, prose: CorpusFile, folder: Path, tuned: Tuned) -> None:
    found = run(build, prose, folder, Goal(max_delta_ppl=20.0))
    assert found.held_out.delta_pct + 1.96 * found.held_out.delta_err_pct <= 20


def test_less_text_where_time_is_short() -> None:
    plan = Plan(Extent(2048, 2))
    whole = plan.fitted(24, 0.01, 60.0)
    assert whole == (Extent(2048, 1), Extent(2048, 2))
    seconds = [0.01 * work(24, *whole), 1000, 500]
    tokens = [work(24, *replace(plan, budget=60 + s).fitted(24, 0.01, 60.0)) for s in seconds]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) == 3
    assert all(0.01 * t <= s for t, s in zip(tokens, seconds, strict=True))


def test_the_figure(tuned: Tuned, tmp_path: Path) -> None:
    save(tuning_figure(tuned), tmp_path / "tuned.svg")
    assert "p.gguf" in (tmp_path / "tuned.svg").read_text()
