"""Cells whose types come from a KV profile: sweep, gate, tables, bench."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.harness import Cli, one_sentence
from tests.support.layouts import LAYERS, LAYOUTS, write_model
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.kv_profile import Profile, model_shape, read_profile, types_text, write_profile
from turbo_eval.llama.build import Build

pytestmark = pytest.mark.build

MIXED = Profile(
    k=("q8_0", "turbo4", "turbo3", "turbo3"), v=("turbo3", "turbo2", "turbo2", "turbo4"), recent=16, first=2
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(LAYOUTS["qwen2"], tmp_path_factory.mktemp("model") / "qwen2.gguf")


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "mixed.kv-profile.gguf"
    write_profile(replace(MIXED, bits=3.90625), model_shape(model), out)
    return out


@pytest.fixture
def cli(tmp_path: Path, build: Build) -> Cli:
    return Cli(tmp_path / "results", build.bin_dir)


def sweep(cli: Cli, model: Path, prose: CorpusFile, *args: str | Path) -> subprocess.CompletedProcess[str]:
    shared: list[str | Path] = ["--model", model, "--corpus", prose.path, "--ctx", "256", "--chunks", "1"]
    return cli.sweep(*shared, *args)


def test_a_profile_is_a_cell(cli: Cli, model: Path, prose: CorpusFile, profile: Path) -> None:
    pairs: list[str | Path] = ["--pairs", "turbo3:turbo3", "--profile", profile, "--metrics", "kld,decode"]
    done = sweep(cli, model, prose, *pairs, "--json")
    assert done.returncode == 0, done.stderr
    rows = {(r["k"], r["metric"]): r for r in json.loads(done.stdout)}
    assert set(rows) == {
        ("f16", "ppl"),
        *((k, metric) for k in ("turbo3", "mixed") for metric in ("kld", "decode")),
    }
    own = rows["mixed", "kld"]
    assert (own["v"], own["recent"], own["first"]) == ("3.91", 16, 2)
    assert (own["bpv_k"], own["bpv_v"]) == (4.8125, 3.0)
    assert own["profile_sha256"] == read_profile(profile).sha256
    assert own["kld"]["mean"] != rows["turbo3", "kld"]["kld"]["mean"]
    assert own["delta_pct"] is not None
    assert abs(rows["mixed", "decode"]["decode"]["delta_pct"]) < 2

    again = sweep(cli, model, prose, *pairs)
    assert "0 cells run, 5 on record" in again.stderr
    assert "mixed" in again.stdout and "3.91" in again.stdout

    table = cli.run("table", cli.results, "--matrix", "kld")
    assert table.returncode == 0 and "mixed" not in table.stdout  # it is no K x V
    report = cli.run("report", cli.results, "--out", cli.results / "report")
    assert report.returncode == 0, report.stderr
    assert "mixed/3.91" in (cli.results / "report" / "index.html").read_text()


def test_content_not_name_identifies_it(
    cli: Cli, model: Path, prose: CorpusFile, profile: Path, tmp_path: Path
) -> None:
    assert sweep(cli, model, prose, "--profile", profile).returncode == 0
    moved = tmp_path / "other-name.gguf"
    moved.write_bytes(profile.read_bytes())
    assert "0 cells run" in sweep(cli, model, prose, "--profile", moved).stderr
    write_profile(replace(MIXED, v=("turbo4",) * LAYERS), model_shape(model), moved)
    assert "1 cells run" in sweep(cli, model, prose, "--profile", moved).stderr


def test_the_window_of_a_profile_can_be_overridden(
    cli: Cli, model: Path, prose: CorpusFile, profile: Path
) -> None:
    done = sweep(cli, model, prose, "--profile", profile, "--recent", "0,auto", "--json")
    assert done.returncode == 0, done.stderr
    rows = [r for r in json.loads(done.stdout) if r["k"] == "mixed"]
    assert [(r["effective_recent"], r["effective_first"]) for r in rows] == [(0, 0), (16, 2)]


def test_refused(cli: Cli, model: Path, prose: CorpusFile, profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_profile(MIXED, replace(model_shape(model), fingerprint=1), other)
    text = tmp_path / "text.gguf"
    text.write_text("no profile")
    for file, why in (
        (other, "is for another model"),
        (text, "is no GGUF file"),
        (model, "is no KV profile"),
        (tmp_path / "none.gguf", "cannot be read"),
    ):
        done = sweep(cli, model, prose, "--profile", file)
        assert done.returncode == 2 and why in done.stderr and one_sentence(done.stderr), done.stderr


def test_gate(cli: Cli, model: Path, prose: CorpusFile, profile: Path, tmp_path: Path) -> None:
    config = tmp_path / "gate.toml"
    config.write_text(
        f"""[sweep]
model = "{model}"
corpus = "{prose.path}"
pairs = []
profile = "{profile}"
metrics = ["kld"]
ctx = 256
chunks = 1
[[check]]
profile = "mix*"
max_kld = 100.0
""",
        encoding="utf-8",
    )
    shared: list[str | Path] = ["gate", config, "--results", cli.results, "--bin-dir", cli.bin_dir]
    assert cli.sweep(config).returncode == 0
    done = cli.run(*shared)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "mixed:3.91" in done.stdout
    config.write_text(config.read_text().replace("100.0", "1e-9"), encoding="utf-8")
    assert cli.run(*shared).returncode == 1


@pytest.mark.parametrize("load", [(), ("--parallel", "2"), ("--draft", "2")])
def test_bench(cli: Cli, model: Path, profile: Path, load: tuple[str, ...]) -> None:
    shared: list[str | Path] = ["--model", model, "--pairs", "turbo3:turbo3", "--depths", "0", "--reps", "1"]
    shared += [*load, "--prompt", "8", "--gen", "2", "--results", cli.results, "--bin-dir", cli.bin_dir]
    done = cli.run("bench", *shared, "--profile", profile, "--json")
    assert done.returncode == 0, done.stderr
    rows = {r["k"]: r for r in json.loads(done.stdout)}
    assert rows["mixed"]["effective_k"] == "profile" and rows["mixed"]["v"] == "3.91"
    assert rows["mixed"]["effective_recent"] == 16 and "--kv-profile" in rows["mixed"]["argv"]
    assert len({r["key"] for r in rows.values()}) == 3


def test_types_as_llama_cpp_prints_them() -> None:
    assert types_text(MIXED.k) == "q8_0:0 turbo4:1 turbo3:2-3"
    assert types_text(("turbo3", "none", "turbo2", "turbo3")) == "turbo3:0,3 turbo2:2"
    assert types_text(("turbo3", "turbo3")) == "turbo3"


def test_read_is_what_was_written(model: Path, tmp_path: Path) -> None:
    statistics = {"blk.0.k_mean": np.ones((2, 4), np.float16)}
    written = replace(MIXED, statistics=statistics, held_out=0.5, provenance={"corpus.name": "c"})
    write_profile(written, model_shape(model), tmp_path / "p.gguf")
    read = read_profile(tmp_path / "p.gguf")
    assert read.shape == model_shape(model)
    assert replace(read.profile, statistics={}) == replace(written, statistics={})
    assert (read.profile.statistics["blk.0.k_mean"] == 1).all()


def test_selftest_of_what_a_profile_needs(build: Build, profile: Path) -> None:
    done = Cli(Path(), build.bin_dir).run("selftest", "--bin-dir", build.bin_dir, "--kv-profile", profile)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("mse turbo2", "attention q8_0:turbo3", "attention turbo3:turbo4", "rotation 64"):
        assert name in done.stdout
    assert "attention turbo4:turbo4" not in done.stdout


def test_probe(build: Build, model: Path, prose: CorpusFile, profile: Path, tmp_path: Path) -> None:
    sides = ["--a", "k=f16,v=f16", "--b", f"profile={profile}"]
    shared: list[str | Path] = ["--corpus", prose.path, "--tokens", "64"]
    done = Cli(tmp_path, build.bin_dir).run("probe", model, *shared, *sides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every step follows from the one before it" in done.stdout
    done = Cli(tmp_path, build.bin_dir).run("probe", model, *shared, "--b", f"k=f16,profile={profile}")
    assert done.returncode == 2 and "names types and a profile" in done.stderr
