"""KL divergence on the real llama-perplexity, whose base is kept in a cache; and the decode path."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.harness import Cli, faulty
from tests.support.rebuild import rebuilt_cpu_backend
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.corpora import cached_path as corpus_path
from turbo_eval.inputs.models import ModelFile
from turbo_eval.inputs.models import cached_path as model_path
from turbo_eval.llama.build import Build
from turbo_eval.metrics.base_logits import BaseLogits, file_bytes
from turbo_eval.records.record import read_record

PAIRS = "f16:f16,q8_0:q8_0,q4_0:q4_0"
OLD = ("--engine", "llama-perplexity")


@pytest.fixture
def cli(
    tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile, monkeypatch: pytest.MonkeyPatch
) -> Cli:
    """With a cache of its own, in which only the model and the text lie."""
    links = [(model_path(smollm.name), smollm.path), (corpus_path(prose.name), prose.path)]
    shared = model_path(smollm.name).parent.parent
    cache = tmp_path / "cache"
    for place, file in links:
        link = cache / place.relative_to(shared)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(cache))
    return Cli(tmp_path / "results", build.bin_dir)


def base_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "logits").glob("*.dat")
    return path


def test_kld_is_that_of_the_command_run_by_hand(cli: Cli, tmp_path: Path) -> None:
    done = cli.sweep("--pairs", PAIRS, "--metrics", "kld", "--ctx", "256", "--chunks", "1", "--json", *OLD)
    assert done.returncode == 0, done.stderr
    rows = {r["k"]: r for r in json.loads(done.stdout)}
    floor = rows["f16"]["kld"]
    assert abs(floor["mean"]) < 1e-4 and floor["same_top_pct"] > 99
    assert 1e-4 < rows["q8_0"]["kld"]["mean"] < rows["q4_0"]["kld"]["mean"] < 0.5
    assert rows["q4_0"]["kld"]["ratio"] == pytest.approx(rows["q4_0"]["ppl"] / floor["ppl_base"], rel=1e-4)

    path = next(p for p in cli.results.rglob("*.json") if ".kld.q4_0-q4_0." in p.name)
    record = read_record(path)
    shown = cli.run("show", record.key, "--results", cli.results)
    assert shown.returncode == 0, shown.stderr
    command = shown.stdout.split("by hand:\n")[1].strip().split("\n\n")[-1]
    by_hand = subprocess.run(command, shell=True, capture_output=True, text=True)
    mean = re.search(r"Mean\s+KLD:\s+([\d.]+) ±\s+([\d.]+)", by_hand.stdout + by_hand.stderr)
    assert mean is not None and record.kld is not None
    assert (record.kld.mean, record.kld.mean_err) == (float(mean[1]), float(mean[2]))

    # one base for all, of the size the format says, reused by the next sweep
    base = base_file(tmp_path)
    assert base.stat().st_size == file_bytes(256, 49152, 1)
    before = base.read_bytes()
    more = cli.sweep(
        "--pairs", "f16:f16,q5_0:q5_0", "--metrics", "kld", "--ctx", "256", "--chunks", "1", *OLD
    )
    assert more.returncode == 0
    assert base_file(tmp_path).read_bytes() == before

    plan = cli.run(
        *("plan", "--pairs", PAIRS, "--metrics", "kld", "--ctx", "256", "--chunks", "1", *OLD),
        *("--bin-dir", cli.bin_dir, "--results", cli.results),
    )
    assert "0 of 3 cells to run" in plan.stdout and "Base logits: 12 MiB, in the cache" in plan.stdout


def test_damaged_base_is_noticed_and_computed_again(cli: Cli, tmp_path: Path) -> None:
    args = ("--pairs", "f16:f16", "--metrics", "kld", "--ctx", "256", "--chunks", "1", "--json", *OLD)
    first = cli.sweep(*args)
    assert first.returncode == 0, first.stderr
    base = base_file(tmp_path)
    good, note = base.read_bytes(), base.with_suffix(".json")
    numbers = [(r["ppl"], r["kld"]) for r in json.loads(first.stdout)]
    for damage in ("truncated", "changed", "other model"):
        if damage == "truncated":
            base.write_bytes(good[:-1000])
        elif damage == "changed":
            base.write_bytes(good[:-1000] + bytes(1000))
        else:
            note.write_text(json.dumps(json.loads(note.read_text()) | {"key": "0" * 16}))
        again = cli.sweep(*args, "--fresh")
        assert again.returncode == 0, again.stderr
        assert base.read_bytes() == good, damage
        assert [(r["ppl"], r["kld"]) for r in json.loads(again.stdout)] == numbers


def test_a_base_that_fails_is_a_status_of_the_cells(cli: Cli, tmp_path: Path, build: Build) -> None:
    rule = 'case "$*" in *"--kl-divergence-base"*) kill -SEGV $$;; esac'
    bad = faulty(tmp_path / "bin", build.bin_dir, rule)
    done = cli.sweep(
        "--pairs", "f16:f16,q8_0:q8_0", "--metrics", "kld", "--ctx", "256", "--chunks", "1", bin_dir=bad
    )
    assert done.returncode == 3
    assert [r["status"] for r in cli.records()] == ["base-invalid", "base-invalid"]
    assert not list((tmp_path / "cache" / "logits").glob("*.dat"))


def test_disk_full_while_the_base_is_written(cli: Cli, tmp_path: Path) -> None:
    """llama-perplexity does not notice a failed write; the length of the file tells."""
    args = ("--pairs", "f16:f16", "--metrics", "kld", "--ctx", "256", "--chunks", "1", *OLD)
    assert cli.sweep(*args).returncode == 0
    base = base_file(tmp_path)
    base.unlink()
    base.with_suffix(".part").symlink_to("/dev/full")
    done = cli.sweep(*args, "--fresh")
    assert done.returncode == 4
    assert "probably full" in done.stderr and "Traceback" not in done.stderr


def test_the_cap_drops_the_oldest(tmp_path: Path) -> None:
    logits = BaseLogits(tmp_path, cap=100)
    for age, name in enumerate(("new", "old")):
        (tmp_path / f"{name}.dat").write_bytes(bytes(40))
        os.utime(tmp_path / f"{name}.dat", (1000 - age, 1000 - age))
    logits.make_room(50, keep=tmp_path / "next.dat")
    assert [p.name for p in tmp_path.glob("*.dat")] == ["new.dat"]
    assert logits.used() == 40


def test_over_the_cap_is_refused(cli: Cli) -> None:
    args = ("--pairs", "f16:f16", "--metrics", "kld", "--ctx", "256", "--chunks", "1", *OLD)
    done = cli.sweep(*args, env={"TURBO_EVAL_LOGITS_GIB": "0.001"})
    assert done.returncode == 2
    assert "the cap is 0.0 GiB" in done.stderr


def test_decode_path(cli: Cli, tmp_path: Path, build: Build) -> None:
    # Few tokens, so a wide bound: rounding alone moves f16 by a percent or two here.
    config = tmp_path / "decode.toml"
    config.write_text("decode = { chunks = 1, bound_pct = 6 }\n")
    args = (config, "--pairs", "f16:f16,q4_0:q4_0", "--metrics", "ppl,decode", "--ctx", "96", "--chunks", "1")
    done = cli.sweep(*args, "--json")
    assert done.returncode == 0, done.stderr
    decode = [r for r in json.loads(done.stdout) if r["metric"] == "decode"]
    batched = {r["k"]: r["ppl"] for r in json.loads(done.stdout) if r["metric"] == "ppl"}
    assert {r["ubatch"] for r in decode} == {1}
    for row in decode:
        assert row["decode"]["ppl_batched"] == pytest.approx(batched[row["k"]], abs=1e-4)
        assert abs(row["decode"]["delta_pct"]) < row["decode"]["bound_pct"] == 6

    # a V whose two halves change places, in a batch of one token alone
    load = "fa_load_v_quant(seg.v_type, v_data, stride, n, DV, w);"
    swap = "std::swap_ranges(w.v32 + i*DV, w.v32 + i*DV + DV/2, w.v32 + i*DV + DV/2)"
    change = {load: f"{load} if (q->ne[1] == 1) {{ for (int64_t i = 0; i < n; ++i) {{ {swap}; }} }}"}
    bad = rebuilt_cpu_backend(build.bin_dir, "fattn-quant.cpp", change, tmp_path / "bin")
    shutil.rmtree(cli.results)
    done = cli.sweep(*args, bin_dir=bad, env={"LD_LIBRARY_PATH": str(bad)})
    assert done.returncode == 3
    status = {(r["cell"]["k"], r["cell"]["metric"]): r for r in cli.records()}
    assert status["q4_0", "decode"]["status"] == "decode-mismatch"
    assert status["q4_0", "decode"]["ppl"] is None
    assert [r["status"] for r in status.values()].count("ok") == 3
    assert "decode-mismatch" in done.stdout
