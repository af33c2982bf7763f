"""bench: synthetic models on the real llama-bench, ratios, and the quality beside the speed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Cli, one_sentence
from tests.support.records import make_record, provenance
from turbo_eval.bench.plan import Step
from turbo_eval.bench.quality import UNVERIFIED, one_token, quality
from turbo_eval.bench.tools import Speeds, read_speeds
from turbo_eval.errors import UsageError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.gguf_info import read_gguf_info
from turbo_eval.inputs.synthetic import PRESETS, Shape, parse_shape, synthetic_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.records.speed import BenchRecord


def bench_record(**changes: Any) -> BenchRecord:
    values: dict[str, Any] = {
        "key": "0" * 16,
        "model": "tiny",
        "model_sha256": "1" * 64,
        "k": "q8_0",
        "v": "turbo3",
        "depth": 0,
        "prompt": 32,
        "gen": 8,
        "backend": "cpu",
        "threads": 1,
        "anchor": "off",
        "tree": "a" * 40,
        "env": {},
        "status": "ok",
        "argv": (),
        "started": "2026-01-01T00:00:00+00:00",
        "provenance": provenance(),
    }
    return BenchRecord(**{**values, **changes})


def test_ratios_are_of_the_same_round() -> None:
    # The machine is half as fast in the second round and a third in the third: the ratio doesn't move.
    record = bench_record(decode=(110.0, 55.0, 36.0), decode_f16=(100.0, 50.0, 30.0))
    assert record.decode_ratio == pytest.approx(1.1)
    assert record.prefill_ratio is None


def test_of_several_sequences_and_of_drafts() -> None:
    record = bench_record(workload="parallel", size=8, prefill=(900.0,), decode=(160.0,))
    assert (record.load, record.decode_each, record.step_ms) == ("p8", 20.0, 50.0)
    one = bench_record(workload="draft", depth=64, decode=(100.0,))
    draft = bench_record(workload="draft", depth=64, size=4, decode=(200.0,))
    assert (draft.load, draft.step_ms, one.step_ms) == ("d64.n4", 20.0, 10.0)
    others = [bench_record(workload="draft", depth=0), bench_record(workload="draft", depth=64, k="turbo3")]
    assert one_token(draft, [draft, *others, one]) == one
    assert one_token(draft, [draft, *others]) is None and one_token(record, [one]) is None


PARALLEL = '{"pp": 64, "tg": 8, "pl": %d, "speed_pp": %s, "speed_tg": %s}'


@pytest.mark.parametrize("speed", ["nan", "NaN", "inf", "Infinity", "0.000000", "-1.5"])
def test_a_speed_that_is_none_is_left_out(speed: str) -> None:
    step = Step("parallel", 0, (1, 4))
    text = "\n".join(["load: x", PARALLEL % (1, "100.5", "10.5"), PARALLEL % (4, "300.5", speed), "{cut"])
    assert read_speeds(text, step) == {1: Speeds(100.5, 10.5)}


def test_the_later_test_of_a_size_counts() -> None:
    """The first one of a process pays for what is done once."""
    text = "\n".join(
        [PARALLEL % (1, "1.5", "1.5"), PARALLEL % (1, "100.5", "10.5"), PARALLEL % (9, "1", "1")]
    )
    assert read_speeds(text, Step("parallel", 0, (1,))) == {1: Speeds(100.5, 10.5)}


def test_quality_only_of_the_same_cell() -> None:
    own = make_record("q8_0:turbo3", 10.1)
    assert quality(bench_record(), [make_record(), own]) == own
    for other in (
        make_record("q8_0:turbo3", 10.1, tree="b" * 40),
        make_record("q8_0:turbo3", 10.1, anchor="auto"),
        make_record("q8_0:turbo3", 10.1, model_sha256="9" * 64),
        make_record("q8_0:turbo3", status="nan", detail="x"),
        make_record("turbo3:turbo3", 10.1),
    ):
        assert quality(bench_record(), [other]) is None


def test_shapes() -> None:
    assert parse_shape("8b") == Shape()
    assert parse_shape("8b,layers=4,weights=f16") == Shape(layers=4, weights="f16")
    assert len({parse_shape(name).name() for name in PRESETS}) == len(PRESETS), "each has a file of its own"
    for bad in ("9b", "layers=many", "weights=q2_k", "arch=gpt2"):
        with pytest.raises(UsageError):
            parse_shape(bad)
    for bad in ("8b,heads=30", "8b,head_dim=20,heads=1,kv_heads=1"):
        with pytest.raises(UsageError):
            parse_shape(bad)


@pytest.mark.parametrize("weights", ["q4_0", "q8_0", "f16"])
def test_synthetic_model_has_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(tmp_path))
    shape = parse_shape(f"tiny,weights={weights}")
    path = synthetic_model(shape)
    info = read_gguf_info(path)
    assert (info.n_layer, info.n_head, info.n_head_kv) == (2, 4, 2)
    assert (info.head_dim_k, info.head_dim_v, info.n_ctx_train) == (64, 64, 8192)
    first = path.read_bytes()
    path.unlink()
    assert synthetic_model(shape).read_bytes() == first, "it is seeded"


def test_the_anchor_is_on_in_a_synthetic_qwen2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    """In every layer, both of its parts, and no layer has a larger type: the cost is the anchor's alone."""
    if not capabilities(build).kv_anchor:
        pytest.skip("an unpatched build has no K anchor")
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(tmp_path))
    model = synthetic_model(parse_shape("tiny,arch=qwen2"))
    bench: list[str | Path] = [
        build.bin_dir / "llama-bench",
        "-m",
        model,
        "-p",
        "8",
        "-n",
        "0",
        "-r",
        "1",
        "-t",
        "1",
        "-fa",
        "1",
    ]
    done = subprocess.run(
        [*bench, "-ctk", "turbo3", "-ctv", "turbo3", "-v"], capture_output=True, text=True, check=True
    )
    said = "on (anchor: 2/2 layers, balance: 2/2 layers from weights, K types: turbo3 x2,"
    assert said in done.stdout + done.stderr


def test_bench_on_the_real_llama_bench(tmp_path: Path, build: Build) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = [
        *("bench", "--synthetic", "tiny", "--pairs", "q8_0:q8_0,q4_0:q5_0", "--depths", "0,256"),
        *("--prompt", "16", "--gen", "4", "--reps", "2", "--threads", "1", "--json"),
    ]
    done = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results, "--plot", tmp_path / "p.svg")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["k"], r["v"], r["depth"]) for r in found] == [
        (k, v, d) for d in (0, 256) for k, v in (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q5_0"))
    ]
    for row in found:
        assert row["status"] == "ok"
        assert (row["effective_k"], row["effective_v"]) == (row["k"], row["v"])
        assert len(row["prefill"]) == len(row["decode"]) == 2 and min(row["prefill"] + row["decode"]) > 0
        assert row["warning"] == UNVERIFIED and row["ppl"] is None
    assert found[0]["decode_ratio"] == 1
    said = [line.split(": ")[0] for line in done.stderr.splitlines() if line.startswith("depth 0")]
    assert said == [
        f"depth 0 round {n}/2 {cell}"
        for n in (1, 2)
        for cell in ("f16/f16", "q8_0/q8_0", "q4_0/q5_0 window 128+4")
    ], "the rounds are interleaved"
    assert (tmp_path / "p.svg").read_text().count("q4_0/q5_0") >= 1
    assert cli.run("table", cli.results).returncode == 3, "benchmarks are no quality records"


TINY = ("bench", "--synthetic", "tiny", "--reps", "1", "--threads", "1")


def _bench(cli: Cli, *args: str | Path) -> tuple[list[dict[str, Any]], str]:
    done = cli.run(*TINY, *args, "--json", "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_several_sequences(tmp_path: Path, build: Build) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ["--pairs", "turbo3:turbo3", "--parallel", "3,1", "--recent", "16", "--prompt", "40", "--gen", "6"]
    rows, said = _bench(cli, *args, "--plot", tmp_path / "p.svg")
    assert [(r["size"], r["k"], r["recent"]) for r in rows] == [
        (1, "f16", 0),
        (1, "turbo3", 16),
        (3, "f16", 0),
        (3, "turbo3", 16),
    ]
    for row in rows:
        assert (row["status"], row["workload"], row["depth"]) == ("ok", "parallel", 0)
        assert (row["effective_k"], row["effective_recent"]) == (row["k"], row["recent"])
        assert len(row["prefill"]) == len(row["decode"]) == 1 and min(row["prefill"] + row["decode"]) > 0
        assert row["decode_each"] == pytest.approx(row["decode"][0] / row["size"])
        assert row["argv"][row["argv"].index("-c") + 1] == "768", "three sequences of 256 cells"
    assert "plan: 2 caches, 1 round, 2 runs (llama-batched-bench, 1,3 sequences: 2 runs)" in said
    assert "new tokens, all sequences" in (tmp_path / "p.svg").read_text()
    again, said = _bench(cli, *args)
    assert again == rows and "plan: 2 caches, 1 round, 0 runs; 4 records kept" in said
    shown = cli.run(*TINY, *args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert "sequences" in shown.stdout and f"quality: {UNVERIFIED}" in shown.stdout
    page = cli.run("report", "--markdown", cli.results)
    assert page.stdout.count("| 3 | turbo3/turbo3 window 16+4 |") == 1


def test_drafts(tmp_path: Path, build: Build) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ["--pairs", "q8_0:q8_0", "--draft", "4", "--depths", "0,300", "--prompt", "0", "--gen", "0"]
    rows, said = _bench(cli, *args, "--plot", tmp_path / "d.svg")
    assert [(r["depth"], r["size"], r["k"]) for r in rows] == [
        (d, n, k) for d in (0, 300) for n in (1, 4) for k in ("f16", "q8_0")
    ]
    for row in rows:
        assert (row["status"], row["workload"], row["prefill"]) == ("ok", "draft", [])
        assert row["effective_k"] == row["k"] and row["decode_ratio"] > 0
        assert row["step_ms"] == pytest.approx(1000 * row["size"] / row["decode"][0])
    assert "llama-bench, depth 300 drafts of 1,4: 2 runs" in said
    assert "drafts at depth 300" in (tmp_path / "d.svg").read_text()
    shown = cli.run(*TINY, *args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert shown.returncode == 0 and "× one token" in shown.stdout


def test_what_is_on_record_is_kept(tmp_path: Path, build: Build) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ["--prompt", "16", "--gen", "0"]
    first, _ = _bench(cli, *args, "--depths", "0", "--pairs", "q8_0:q8_0")
    more, said = _bench(cli, *args, "--depths", "0,64", "--pairs", "q8_0:q8_0,q4_0:q4_0", "--recent", "0")
    assert "depth 0: 2 runs; llama-bench, depth 64: 3 runs" in said and "5 runs; 1 records kept" in said
    assert more[1] == first[1], "q8_0 was not run again"
    assert more[0]["key"] == first[0]["key"], "f16 ran again, beside q4_0"
    _, said = _bench(cli, *args, "--depths", "0", "--pairs", "q8_0:q8_0", "--reps", "2")
    assert "plan: 2 caches, 2 rounds, 4 runs" in said, "one round on record is not two"
    _, said = _bench(cli, *args, "--depths", "0", "--pairs", "q8_0:q8_0", "--fresh")
    assert "plan: 2 caches, 1 round, 2 runs" in said


def test_what_failed_runs_again(tmp_path: Path, build: Build) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = [*TINY, "--pairs", "q8_0:q8_0", "--draft", "2", "--depths", "4096", "--timeout", "0.01", "--json"]
    done = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert done.returncode == 3 and {r["status"] for r in json.loads(done.stdout)} == {"timeout"}
    assert "q8_0/q8_0 with a draft of 2 at depth 4096 is timeout" in done.stderr
    again = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert "plan: 2 caches, 1 round, 2 runs" in again.stderr


def test_windows_beside_each_other(tmp_path: Path, build: Build) -> None:
    """Each run has the window that was asked for, and not llama.cpp's default."""
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ["bench", "--synthetic", "tiny", "--pairs", "turbo3:turbo3", "--depths", "0", "--json"]
    args += ["--recent", "0,16,128", "--prompt", "16", "--gen", "0", "--reps", "1", "--threads", "1"]
    done = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert done.returncode == 0, done.stderr
    rows = [r for r in json.loads(done.stdout) if r["k"] == "turbo3"]
    assert [(r["recent"], r["first"]) for r in rows] == [(0, 0), (16, 4), (128, 4)]
    assert [(r["effective_recent"], r["effective_first"]) for r in rows] == [(0, 0), (16, 4), (128, 4)]


def test_anchor_states_beside_each_other(tmp_path: Path, build: Build) -> None:
    if not capabilities(build).kv_anchor:
        pytest.skip("an unpatched build has no K anchor")
    cli = Cli(tmp_path / "results", build.bin_dir)
    args = ["bench", "--synthetic", "tiny", "--pairs", "q8_0:q8_0", "--depths", "0", "--anchor", "auto,off"]
    args += ["--prompt", "16", "--gen", "0", "--reps", "2", "--threads", "1"]
    done = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert done.returncode == 0, done.stderr
    said = [line.split(": ")[0] for line in done.stderr.splitlines() if line.startswith("depth 0")]
    cells = ("f16/f16", "q8_0/q8_0 (anchor auto)", "q8_0/q8_0 (anchor off)")
    assert said == [f"depth 0 round {n}/2 {cell}" for n in (1, 2) for cell in cells]
    assert "(anchor off)" in done.stdout.replace("\n", "")
    wrong = cli.run("bench", "--synthetic", "tiny", "--anchor", "of", "--bin-dir", cli.bin_dir)
    assert wrong.returncode == 2 and "is not auto, on or off" in wrong.stderr


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--model", "a", "--synthetic", "8b"),
        ("--synthetic", "tiny", "--depths", "-1"),
        ("--synthetic", "tiny", "--parallel", "0"),
        ("--synthetic", "tiny", "--parallel", "257"),
        ("--synthetic", "tiny", "--parallel", "4", "--gen", "0"),
        ("--synthetic", "tiny", "--draft", "513"),
        ("--synthetic", "tiny", "--draft", "nan"),
    ],
)
def test_bad_usage(tmp_path: Path, build: Build, args: tuple[str, ...]) -> None:
    cli = Cli(tmp_path, build.bin_dir)
    done = cli.run("bench", *args, "--bin-dir", cli.bin_dir, "--pairs", "q8_0:q8_0")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_block_that_does_not_divide_head_dim(
    tmp_path: Path, build: Build, prose: CorpusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli(tmp_path / "results", build.bin_dir)
    with monkeypatch.context() as patch:
        patch.setenv("TURBO_EVAL_CACHE", str(tmp_path / "cache"))
        model = synthetic_model(parse_shape("tiny,head_dim=80"))
    done = cli.sweep("--model", model, "--pairs", "f16:f16,f16:q8_0")
    assert done.returncode == 2 and one_sentence(done.stderr)
    assert "q8_0 works on blocks of 32 values, which do not divide head_dim 80 of V" in done.stderr
