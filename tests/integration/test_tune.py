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
from turbo_eval.inputs.models import ModelFile, resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.tune.measure import Extent
from turbo_eval.tune.prepare import Fit, Plan, Progress
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
    done = tune(
        model, prose, build, folder / "p.gguf", plan, goal, lambda share, what, left: shares.append(share)
    )
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1, abs=0.1 if goal.bits else 0.3)
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
    fewer = [row for row in found.rows if row.name == "by layer" and row.bits < found.allocation.bits]
    assert all(row.kld.mean > bound for row in fewer)


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


@pytest.mark.slow
def test_the_fewest_bits_for_a_bound_on_a_real_model(
    build: Build, smollm: ModelFile, prose: CorpusFile, tmp_path: Path
) -> None:
    """SmolLM2-135M in contexts of 1024 tokens; then what can be reached, and a bound a tenth tighter."""

    def within(bound: float) -> Tuned:
        plan, out = Plan(Extent(1024, 1), threads=1), tmp_path / "p.gguf"
        return tune(smollm, prose, build, out, plan, Goal(max_kld=bound), lambda share, what, left: None)

    found = within(0.01)
    tried = [row for row in found.rows if row.name == "by layer"]
    assert found.held_out.mean <= 0.01 and found.allocation.bits < 4.25
    assert any(row.bits < found.allocation.bits for row in tried)
    assert all(row.kld.mean > 0.01 for row in tried if row.bits < found.allocation.bits)
    with pytest.raises(RegressionError) as far:
        within(1e-9)
    least = float(str(far.value).split("the nearest has ")[1].split()[0])
    assert 0 < least < 0.001
    with pytest.raises(RegressionError, match=f"the nearest has {least:.5f} at"):
        within(0.9 * least)
    assert within(1.1 * least).held_out.mean <= 1.1 * least


def test_a_bound_on_perplexity(build: Build, prose: CorpusFile, folder: Path, tuned: Tuned) -> None:
    found = run(build, prose, folder, Goal(max_delta_ppl=20.0))
    assert found.held_out.delta_pct + 1.96 * found.held_out.delta_err_pct <= 20


def test_less_work_where_time_is_short() -> None:
    plan = Plan(Extent(2048, 2))
    whole = plan.fitted(24, 0.01)
    assert whole == Fit(Extent(2048, 1), Extent(2048, 2), 1)
    seconds = [4000, 2000, 1500, 600]
    fits = [replace(plan, budget=s).fitted(24, 0.01) for s in seconds]
    tokens = [plan.work(24, fit) for fit in fits]
    assert fits[0] == whole and fits[1].v_together == 2 and fits[1].finding == whole.finding
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) == len(tokens)
    assert all(0.01 * t <= s for t, s in zip(tokens, seconds, strict=True))


def test_a_short_budget_gives_a_profile_too(build: Build, prose: CorpusFile, folder: Path) -> None:
    done = run(build, prose, folder, Goal(3.25), replace(PLAN, budget=0.01))
    assert done.allocation.bits <= 3.25 and done.what.endswith("judged on 1 x 256 tokens")


def test_the_time_left_is_that_of_what_was_measured() -> None:
    said: list[tuple[float, str, float | None]] = []
    progress = Progress(lambda *step: said.append(step), total=1000, done=100, seconds_per_token=1.0)
    progress("cells")
    progress("cells", 300)  # known before: no time is taken from them
    progress("cells", 100, 50.0)
    progress("other cells", 100, 30.0)
    assert said == [
        (0.1, "cells", 900.0),
        (0.4, "cells", 600.0),
        (0.5, "cells", 250.0),
        (0.6, "other cells", 160.0),
    ]


def test_the_figure(tuned: Tuned, tmp_path: Path) -> None:
    save(tuning_figure(tuned), tmp_path / "tuned.svg")
    assert "p.gguf" in (tmp_path / "tuned.svg").read_text()
