"""compare says the true difference and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_bench import bench_record
from tests.support.harness import Cli
from tests.support.records import MACHINE, make_kld, make_record
from turbo_eval.analysis.compare import Comparison, Side, compare, render
from turbo_eval.analysis.compare.difference import _others
from turbo_eval.analysis.statistics import student_p
from turbo_eval.errors import IncompleteError
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities
from turbo_eval.records.record import Greedy, Record
from turbo_eval.records.speed import BenchRecord
from turbo_eval.records.store import Store

M2 = MACHINE.model_copy(update={"id": "m2", "gpu": "Apple8"})
M5 = MACHINE.model_copy(update={"id": "m5", "gpu": "Apple10"})
RNG = np.random.default_rng(0)
TEXT = RNG.normal(2.5, 0.4, size=12)  # mean negative log likelihood of each chunk


def with_chunks(record: Record, nll: np.ndarray) -> Record:
    """The record of a run whose chunks had these mean negative log likelihoods."""
    running = np.exp(np.cumsum(nll) / np.arange(1, len(nll) + 1)).round(4)
    ppl = float(running[-1])
    changes = {"running_ppl": tuple(running.tolist()), "ppl": ppl, "ppl_err": ppl * 0.03}
    return record.model_copy(update=changes)


def run(pair: str, shift: float = 0.0, scatter: float = 0.0, **cell: object) -> Record:
    noise = RNG.normal(0, scatter, size=len(TEXT)) if scatter else 0.0
    record = make_record(pair, chunks=len(TEXT), **cell)  # type: ignore[arg-type]
    return with_chunks(record, TEXT + shift + noise)


def compared(a: list[Record], b: list[Record]) -> Comparison:
    return compare(Side("A", tuple(a)), Side("B", tuple(b)))


@pytest.mark.parametrize(
    ("t", "df", "p"), [(12.706, 1, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01), (1.96, 10**6, 0.05)]
)
def test_student_table(t: float, df: int, p: float) -> None:
    assert student_p(t, df) == pytest.approx(p, rel=2e-3)


def test_noise_is_rarely_called_a_difference() -> None:
    alarms = 0
    for _ in range(300):
        pairs = ("f16:f16", "q8_0:q8_0", "turbo4:turbo4", "turbo3:turbo3")
        a = [run(pair, scatter=1e-3, machine=M2) for pair in pairs]
        b = [run(pair, scatter=1e-3, machine=M5) for pair in pairs]
        alarms += bool(compared(a, b).differing)
    assert alarms <= 12, "at most 1 % is the promise, doubled for the second test, and room for chance"


def test_the_reports_question_is_it_the_hardware() -> None:
    pairs = ("f16:f16", "q8_0:q8_0", "q8_0:turbo3", "turbo3:turbo3", "q8_0:turbo4")
    a = [run(pair, scatter=1e-4, machine=M2) for pair in pairs]
    b = [run(p, shift=0.05 * p.endswith("turbo3"), scatter=1e-4, machine=M5) for p in pairs]
    result = compared(a, b)
    assert {d.pair for d in result.differing} == {"q8_0:turbo3", "turbo3:turbo3"}
    assert "Every cell with turbo3 on V differs" in result.diagnosis
    assert "the GPU differs: suspect the kernels for turbo3 on V of Apple8 or Apple10" in result.diagnosis
    assert [row[0] for row in result.provenance] == ["GPU"]
    delta = result.differing[0].delta
    assert delta is not None
    assert delta == pytest.approx(5.13, abs=0.05)


def test_the_most_surprising_comes_first() -> None:
    a = [run("f16:f16"), run("q8_0:q8_0", scatter=1e-3), make_record("q8_0:turbo4", chunks=12)]
    b = [
        run("f16:f16", tree="b" * 40),
        run("q8_0:q8_0", shift=0.01, scatter=1e-3, tree="b" * 40),
        make_record("q8_0:turbo4", None, status="nan", chunks=12, tree="b" * 40),
    ]
    result = compared(a, b)
    assert [d.pair for d in result.differing] == ["q8_0:turbo4", "q8_0:q8_0"]
    assert "bisect" in result.diagnosis
    text = render.render_markdown(result)
    assert "| q8_0:turbo4 | ppl | 10.0000 | nan |" in text
    assert "| patched tree | aaaaaaaaaaaaaaaa | bbbbbbbbbbbbbbbb |" in text


def test_one_chunk_is_enough_for_a_factor() -> None:
    a, b = make_record("turbo4:turbo4", 6.7), make_record("turbo4:turbo4", 218.0, tree="b" * 40)
    assert len(compared([a], [b]).differing) == 1


def test_anchor_on_and_off() -> None:
    def effective(record: Record, anchor: str) -> Record:
        update = {"anchor": anchor}
        return record.model_copy(update={"effective": record.effective.model_copy(update=update)})

    pairs = ("f16:f16", "f16:turbo4", "turbo4:f16", "turbo4:turbo4")
    off = [effective(run(p, shift=3.0 * p.startswith("turbo"), anchor="off"), "off") for p in pairs]
    on = [effective(run(p, anchor="auto"), "on (anchor: 12/24 layers)") for p in pairs]
    result = compared(off, on)
    assert "Every cell with turbo4 on K differs" in result.diagnosis
    assert "Only the K anchor differs (off; on (anchor: 12/24 layers)): it explains this." in result.diagnosis


def test_kld_uses_its_own_error() -> None:
    a = make_record("turbo3:turbo3", 10.0, kld=make_kld(0.1))
    near = make_record("turbo3:turbo3", 10.0, kld=make_kld(0.105), tree="b" * 40)
    far = make_record("turbo3:turbo3", 10.0, kld=make_kld(0.2), tree="b" * 40)
    assert not compared([a], [near]).differing
    assert [d.what for d in compared([a], [far]).differing] == ["KLD"]


def test_speed_is_compared_as_a_share_of_f16() -> None:
    def speed(tree: str, share: float) -> BenchRecord:
        # The machine's own pace swings; the share of f16 hardly does.
        pace = RNG.uniform(0.5, 1, size=6)
        rounds = share * pace * RNG.normal(1, 0.002, size=6)
        return bench_record(tree=tree * 40, decode=tuple(rounds), decode_f16=tuple(pace), depth=4096)

    def side(name: str, record: BenchRecord) -> Side:
        return Side(name, (), (record,))

    slower = compare(side("A", speed("a", 1.1)), side("B", speed("b", 0.9)))
    assert [(d.what, d.ctx) for d in slower.differing] == [("decode / f16", "d4096")]
    assert slower.diagnosis == "Speed differs: decode / f16 of q8_0:turbo3 at d4096."
    assert slower.differing[0].delta == pytest.approx(-18, abs=1)
    assert not compare(side("A", speed("a", 1.1)), side("B", speed("b", 1.1))).differing
    assert "| q8_0:turbo3 | decode / f16 | 1.1" in render.render_markdown(slower)


def test_nothing_in_common_is_no_verdict() -> None:
    other = make_record("f16:f16", model_sha256="9" * 64)
    with pytest.raises(IncompleteError, match="no model in common"):
        compared([make_record()], [other])


def test_a_cell_on_one_side_is_named() -> None:
    result = compared([make_record(), make_record("q8_0:q8_0")], [make_record(tree="b" * 40)])
    assert result.only_a == ("tiny q8_0:q8_0 ppl -c 512, 4 chunks of prose",)


def test_command_line(tmp_path: Path) -> None:
    cli = Cli(tmp_path, tmp_path)
    for folder, shift in (("a", 0.0), ("b", 0.0), ("c", 0.2)):
        for pair in ("f16:f16", "turbo4:turbo4"):
            record = run(pair, shift=shift * pair.startswith("turbo"))
            Store(tmp_path / folder, "m").write(record)
    same = cli.run("compare", tmp_path / "a", tmp_path / "b")
    assert same.returncode == 0, same.stderr
    assert "No cell differs beyond noise" in same.stdout
    other = cli.run("compare", tmp_path / "a", tmp_path / "c", "--format", "json")
    assert other.returncode == 1, other.stderr
    assert '"pair"' not in other.stdout
    assert "Only turbo4:turbo4 differs" in other.stdout
    narrowed = cli.run("compare", tmp_path / "a", f"{tmp_path / 'c'}@k=f16", "--format", "markdown")
    assert narrowed.returncode == 0, narrowed.stderr
    assert "Only A has: tiny turbo4:turbo4 ppl -c 512, 12 chunks of prose." in narrowed.stdout
    for bad in ("@colour=red", "nowhere"):
        failed = cli.run("compare", tmp_path / "a", bad if bad[0] != "@" else f"{tmp_path / 'c'}{bad}")
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1


@pytest.mark.build
def test_real_runs(tmp_path: Path, build: Build, smollm: ModelFile) -> None:
    """The same build twice: none. Its attention rotation off: the quantized pairs and the reason."""
    pair = "turbo3:turbo3" if "turbo3" in capabilities(build).cache_types else "q4_0:q4_0"
    sweep = (
        "--model",
        smollm.path,
        "--pairs",
        f"f16:f16,{pair}",
        "--ctx",
        "64",
        "--chunks",
        "20",
        "--recent",
        "0",
    )
    runs: tuple[tuple[str, dict[str, str]], ...] = (
        ("one", {}),
        ("two", {}),
        ("bare", {"LLAMA_ATTN_ROT_DISABLE": "1"}),
    )
    for name, env in runs:
        done = Cli(tmp_path / name, build.bin_dir).sweep(*sweep, env=env)
        assert done.returncode == 0, done.stderr
    cli = Cli(tmp_path, build.bin_dir)
    same = cli.run("compare", tmp_path / "one", tmp_path / "two", "--format", "markdown")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "No cell differs beyond noise" in same.stdout
    bare = cli.run("compare", tmp_path / "one", tmp_path / "bare", "--format", "markdown")
    assert bare.returncode == 1, bare.stdout + bare.stderr
    assert f"Only {pair} differs; f16:f16 agrees." in bare.stdout
    assert "Only the environment differs (none; LLAMA_ATTN_ROT_DISABLE=1): it explains this." in bare.stdout


def test_the_error_of_greedy_agreement_is_that_of_all_tokens_once() -> None:
    """`tokens` counts those of all prompts: times the prompts it made the error half as large."""

    def record(agree: float) -> Record:
        found = Greedy(
            prompts=4, tokens=128, identical_pct=0, agree_pct=agree, first_divergence=3, outputs=()
        )
        return make_record("q8_0:q8_0", None, metric="greedy").model_copy(update={"greedy": found})

    ((what, a, b, error_a, error_b),) = _others(record(90.0), record(80.0))
    assert (what, a, b) == ("greedy same %", 90.0, 80.0)
    assert error_a == pytest.approx(100 * math.sqrt(0.9 * 0.1 / 128), rel=0.05)
    assert error_b == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 128), rel=0.05)
