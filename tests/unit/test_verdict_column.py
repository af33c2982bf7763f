"""Verdicts from paired tests: in the table, in the gate, in compare, and none where figures are missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.records import MACHINE, make_chunks, make_kld, make_record
from tests.unit.test_gate import F16, INFO, gate
from turbo_eval.analysis import table
from turbo_eval.analysis.compare import compare
from turbo_eval.analysis.compare.match import Side
from turbo_eval.analysis.compare.render import render_markdown
from turbo_eval.analysis.gate import run_gate
from turbo_eval.analysis.statistics import table_verdicts
from turbo_eval.analysis.summary import Summary, said_of_reference, summarize
from turbo_eval.errors import UsageError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.metrics.base import Job
from turbo_eval.records.pairing import Paired
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.spec import Check, GateSpec, sweep_spec

CHUNKS = 16


def chunks_of(percent: float, noise: float = 0.3, chunks: int = CHUNKS) -> tuple[float, ...]:
    """ln(PPL / PPL of f16/f16) by chunk: mean and spread (of a chunk, in percent) are exactly those given."""
    rough = np.random.default_rng(1).normal(size=chunks)
    rough = (rough - rough.mean()) / rough.std(ddof=1)
    return tuple(math.log1p(percent / 100) + noise / 100 * rough)


def record(pair: str, percent: float, noise: float = 0.3, *, sequential: bool = False) -> Record:
    own = make_chunks(chunks_of(percent, noise), sequential=sequential)
    return make_record(pair, by_chunk=own, chunks=CHUNKS)


def reference() -> Record:
    return make_record(by_chunk=make_chunks((0.0,) * CHUNKS), chunks=CHUNKS)


WORSE, SAME, BETTER = record("q4_0:q4_0", 2.0), record("q8_0:q8_0", 0.1), record("q5_0:q5_0", -2.0)
OPEN = record("turbo3:turbo3", 1.0)


def rows(*records: Record, margin: float = 1.0) -> list[Summary]:
    return summarize([reference(), *records], margin=margin)


def test_each_verdict() -> None:
    found = {row.k: str(row.verdict) for row in rows(WORSE, SAME, BETTER, OPEN) if row.k != "f16"}
    expected = {
        "q4_0": "worse",
        "q8_0": "equivalent",
        "q5_0": "better",
        "turbo3": "undecided (at the margin)",
    }
    assert {k: found[k] for k in ("q4_0", "q8_0", "q5_0")} == {
        k: expected[k] for k in ("q4_0", "q8_0", "q5_0")
    }
    assert found["turbo3"].startswith("undecided")
    assert next(row for row in rows(SAME) if row.k == "f16").verdict is None, (
        "nothing is compared with itself"
    )


def test_the_table_says_what_the_verdicts_are_about() -> None:
    text = table.render_markdown(rows(WORSE, record("q8_0:q8_0", 0.9)))
    assert "verdict on ±1 %, 5 % error rate over the table" in text
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| q")}
    assert " worse |" in lines["q4_0"] and "undecided (+" in lines["q8_0"]
    assert "n more chunks would tell" in text
    line = next(x for x in json.loads(table.render_json(rows(WORSE))) if x["k"] == "q4_0")
    assert line["verdict"] == "worse" and line["verdict_margin_pct"] == 1.0
    assert line["delta_low_pct"] < line["delta_pct"] < line["delta_high_pct"]
    assert line["delta_pct"] == pytest.approx(2.0)
    # the error is that over chunks
    assert line["delta_err_pct"] == pytest.approx(1.02 * 0.3 / math.sqrt(CHUNKS), rel=1e-6)


def test_another_margin_is_another_question() -> None:
    assert str(rows(WORSE, margin=5.0)[-1].verdict) == "equivalent"


def test_records_without_figures_of_each_token_have_no_verdict() -> None:
    old = make_record("q8_0:q8_0", 10.1)
    none = summarize([F16, old])
    assert all(row.verdict is None for row in none)
    assert "no verdict: no figures of each token are on record" in said_of_reference(none)
    mixed = rows(WORSE, make_record("q8_0:q8_0", 10.1, chunks=CHUNKS))
    assert "none for q8_0/q8_0: no figures of each token" in said_of_reference(mixed)


def test_all_verdicts_of_a_table_together_keep_the_error_rate() -> None:
    """Caches exactly at the margin: whatever is said of them is wrong. And caches that are f16 in truth."""
    rng = np.random.default_rng(7)
    for truth, wrong in ((math.log1p(0.01), {"equivalent", "better"}), (0.0, {"worse", "better"})):
        runs, false = 1000, 0
        for _ in range(runs):
            drawn = truth + 0.004 * rng.normal(size=(8, 12))
            said = table_verdicts([Paired(tuple(one), False) for one in drawn], 1.0)
            false += any(decision.verdict in wrong for decision in said)
        assert false / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    alone = sum(
        Paired(tuple(math.log1p(0.01) + 0.004 * rng.normal(size=12)), False).decide(1.0).verdict
        == "equivalent"
        for _ in range(8 * 1000)
    )
    assert alone / 1000 > 0.2, "without the correction a table of eight would err far more often"


def test_a_number_of_chunks_that_was_chosen_by_looking_needs_the_wider_interval() -> None:
    plain, looked = record("q8_0:q8_0", 0.77), record("q8_0:q8_0", 0.77, sequential=True)
    assert str(rows(plain)[-1].verdict) == "equivalent"
    assert str(rows(looked)[-1].verdict).startswith("undecided")
    assert rows(plain)[-1].beyond_doubt(1.0) and not rows(looked)[-1].beyond_doubt(1.0)
    assert rows(looked)[-1].beyond_doubt(5.0) and rows(looked)[-1].beyond_doubt(0.0)


@pytest.mark.parametrize(
    ("test", "percent", "code", "says"),
    [
        ("equivalent_within", 0.1, 0, "is equivalent within 1 %, error rate 5 %"),
        ("equivalent_within", 2.0, 1, "is not equivalent within 1 %, error rate 5 %"),
        ("equivalent_within", -2.0, 1, "is not equivalent within 1 %, error rate 5 %"),
        ("equivalent_within", 0.95, 3, "not decided whether it is equivalent within 1 %; about"),
        ("not_worse_than", 0.1, 0, "is not worse than 1 %, error rate 5 %"),
        ("not_worse_than", -2.0, 0, "is not worse than 1 %, error rate 5 %"),
        ("not_worse_than", 2.0, 1, "is worse than 1 %, error rate 5 %"),
        ("not_worse_than", 1.05, 3, "not decided whether it is not worse than 1 %; about"),
    ],
)
def test_the_gate_tests(tmp_path: Path, test: str, percent: float, code: int, says: str) -> None:
    result = gate(tmp_path, [reference(), record("q8_0:q8_0", percent)], {"pair": "q8_0:*", test: 1.0})
    assert result.exit_code == code
    (sentence,) = result.passed + result.regressions + result.incomplete
    assert says in sentence and f"ΔPPL {percent:+.3f} %" in sentence and "against f16/f16" in sentence


def test_the_gate_has_no_verdict_without_figures(tmp_path: Path) -> None:
    check = {"pair": "*", "not_worse_than": 1.0}
    result = gate(tmp_path, [F16, make_record("q8_0:q8_0", 10.0001)], check)
    assert result.exit_code == 3
    assert any("needs figures of each token" in s for s in result.incomplete)
    assert any("it is f16/f16 itself" in s for s in result.passed)
    crashed = make_record("q8_0:q8_0", status="crash", detail="killed")
    assert gate(tmp_path / "b", [F16, crashed], check).exit_code == 3


def test_the_gate_takes_what_llama_perplexity_measured(tmp_path: Path) -> None:
    """Records of workers and of older versions: the KL divergence counts, though its key is another."""
    old = make_record("q8_0:q8_0", 10.1, kld=make_kld(0.01))
    Store(tmp_path, MACHINE.id).write(old)
    asked = old.model_copy(update={"cell": old.cell.model_copy(update={"engine": "kv-eval"})})
    assert asked.cell.key() != old.key
    spec = GateSpec(
        sweep=sweep_spec({"pairs": ["q8_0:q8_0"]}, "test"),
        check=(Check.model_validate({"pair": "q8_0:*", "max_kld": 0.02}),),
    )
    build = Build("cpu", Path("bin"), "a" * 40, "", False, "", (), "")
    model = ModelFile("tiny", Path("tiny.gguf"), "1" * 64, 1, INFO)
    job = Job(asked.cell, model, CorpusFile("prose", Path("prose.txt"), "2" * 64, 1), None)
    result = run_gate(spec, Plan(spec.sweep, build, (job,), 1), Store(tmp_path, MACHINE.id))
    assert result.exit_code == 0, result


@pytest.mark.parametrize("margin", [0, -1, math.nan, math.inf, True, "x"])
def test_a_margin_is_a_number_above_nothing(margin: object) -> None:
    with pytest.raises((UsageError, ValueError)):
        Check.model_validate({"pair": "*", "equivalent_within": margin})
    with pytest.raises(ValueError, match="must_fail"):
        Check.model_validate({"pair": "*", "equivalent_within": 1, "must_fail": True})


def test_compare_tests_the_same_tokens() -> None:
    a, b = record("q8_0:q8_0", 0.1), record("q8_0:q8_0", 0.15)
    moved = b.model_copy(update={"cell": b.cell.model_copy(update={"tree": "b" * 40})})
    result = compare(Side("A", (a,)), Side("B", (moved,)))
    text = render_markdown(result)
    assert "| differs, equivalent within 1 % |" in text and "unpaired" not in text, "certain, and small"
    noisy = record("q8_0:q8_0", 0.15, 0.6)
    again = noisy.model_copy(update={"cell": moved.cell})
    assert "| equivalent within 1 % |" in render_markdown(compare(Side("A", (a,)), Side("B", (again,))))
