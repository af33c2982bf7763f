"""Gate: what passes, what fails with which sentence, what is incomplete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.records import MACHINE, make_cell, make_kld, make_record
from turbo_eval.analysis.gate import GateResult, run_gate
from turbo_eval.errors import UsageError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.gguf_info import GgufInfo
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.metrics.base import Job
from turbo_eval.records.record import Decode, Record
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.spec import Check, GateSpec, load_gate, sweep_spec

INFO = GgufInfo(
    arch="llama",
    name="tiny",
    file_type="",
    n_layer=30,
    n_embd=576,
    n_head=9,
    n_head_kv=3,
    head_dim_k=64,
    head_dim_v=64,
    n_ctx_train=8192,
    n_vocab=49152,
    tensor_count=1,
)


def gate(tmp_path: Path, records: list[Record], *checks: dict[str, Any], pairs: str = "") -> GateResult:
    """Judge `records`; the plan asks for `pairs` (default: those of the records)."""
    store = Store(tmp_path, MACHINE.id)
    for record in records:
        store.write(record)
    wanted = pairs.split(",") if pairs else [r.cell.pair() for r in records]
    spec = GateSpec(
        sweep=sweep_spec({"pairs": wanted}, "test"),
        check=tuple(Check.model_validate(c) for c in checks),
    )
    build = Build("cpu", Path("bin"), "a" * 40, "", False, "", (), "")
    model = ModelFile("tiny", Path("tiny.gguf"), "1" * 64, 1, INFO)
    corpus = CorpusFile("prose", Path("prose.txt"), "2" * 64, 1)
    cells = [make_cell(p) for p in wanted] if pairs else [r.cell for r in records]
    plan = Plan(spec.sweep, build, tuple(Job(c, model, corpus, None) for c in cells), 1)
    return run_gate(spec, plan, store)


F16, GOOD, BAD = make_record(ppl=10.0), make_record("q8_0:q8_0", 10.1), make_record("q4_0:q4_0", 12.0)


def test_within_the_bounds(tmp_path: Path) -> None:
    result = gate(tmp_path, [F16, GOOD], {"pair": "q8_0:*", "max_delta_pct": 2, "max_ppl": 11})
    assert result.exit_code == 0
    (sentence,) = result.passed
    assert "ΔPPL +1.000 %" in sentence and "perplexity 10.1000" in sentence


def test_a_regression_says_both_numbers(tmp_path: Path) -> None:
    result = gate(tmp_path, [F16, GOOD, BAD], {"pairs": ["q*"], "max_delta_pct": 5})
    assert result.exit_code == 1
    assert result.regressions == ["tiny q4_0:q4_0: ΔPPL +20.000 % against f16/f16, at most 5 % is allowed."]


def test_the_bound_itself_is_allowed_and_nothing_is_rounded_away(tmp_path: Path) -> None:
    at, over = make_record("q8_0:q8_0", 11.0), make_record("q4_0:q4_0", 11.00001)
    result = gate(tmp_path, [F16, at, over], {"pairs": ["q*"], "max_ppl": 11})
    assert len(result.regressions) == 1 and "q4_0:q4_0" in result.regressions[0]


def test_missing_record(tmp_path: Path) -> None:
    check = {"pair": "q8_0:q8_0", "max_ppl": 11}
    assert gate(tmp_path, [F16, GOOD], check, pairs="f16:f16,q8_0:q8_0,q4_0:q4_0").exit_code == 3


def test_no_records_at_all(tmp_path: Path) -> None:
    assert gate(tmp_path, [], {"pair": "q8_0:q8_0", "max_ppl": 11}, pairs="f16:f16,q8_0:q8_0").exit_code == 3


def test_stale_record(tmp_path: Path) -> None:
    old = make_record("q8_0:q8_0", 10.1, tree="b" * 40)
    Store(tmp_path, MACHINE.id).write(old)
    result = gate(tmp_path, [F16], {"pair": "*", "max_ppl": 11}, pairs="f16:f16,q8_0:q8_0")
    assert result.exit_code == 3
    assert any("stale" in s and "bbbbbbbbbbbb" in s for s in result.incomplete)


def test_failed_cell_is_incomplete_even_if_no_check_speaks_of_it(tmp_path: Path) -> None:
    crashed = make_record("q5_0:q5_0", status="crash", detail="killed by SIGSEGV")
    result = gate(tmp_path, [F16, GOOD, crashed], {"pair": "q8_0:q8_0", "max_ppl": 11})
    assert result.exit_code == 3
    assert any("SIGSEGV" in s for s in result.incomplete)


def test_no_baseline_no_verdict(tmp_path: Path) -> None:
    bad_base = make_record(status="nan", detail="nan from chunk 1 on")
    result = gate(tmp_path, [bad_base, GOOD], {"pair": "q8_0:q8_0", "max_delta_pct": 50})
    assert result.exit_code == 3
    assert any("its reference f16/f16 of the same text" in s for s in result.incomplete)


def test_a_check_that_matches_nothing_is_no_pass(tmp_path: Path) -> None:
    assert gate(tmp_path, [F16], {"pair": "turbo4:*", "max_ppl": 99}).exit_code == 3


@pytest.mark.parametrize(("ppl", "code"), [(200.0, 0), (50.0, 1)])
def test_must_fail(tmp_path: Path, ppl: float, code: int) -> None:
    broken = make_record("turbo3:turbo3", ppl)
    check = {"pair": "turbo3:turbo3", "max_ppl": 100, "must_fail": True}
    assert gate(tmp_path, [F16, broken], check).exit_code == code


def test_must_fail_wants_a_number(tmp_path: Path) -> None:
    broken = make_record("turbo3:turbo3", status="crash", detail="x")
    check = {"pair": "turbo3:turbo3", "max_ppl": 100, "must_fail": True}
    assert gate(tmp_path, [F16, broken], check).exit_code == 3


@pytest.mark.parametrize(("status", "code"), [("nan", 0), ("crash", 1)])
def test_expected_status(tmp_path: Path, status: str, code: int) -> None:
    broken = make_record("turbo3:turbo3", status=status, detail="x")
    result = gate(tmp_path, [F16, broken], {"pair": "turbo3:turbo3", "status": "nan"})
    assert result.exit_code == code


def test_another_machine_is_no_baseline(tmp_path: Path) -> None:
    elsewhere = make_record(ppl=1.0, machine=MACHINE.model_copy(update={"id": "other"}))
    Store(tmp_path, "other").write(elsewhere)
    result = gate(tmp_path, [GOOD], {"pair": "q8_0:q8_0", "max_delta_pct": 5}, pairs="f16:f16,q8_0:q8_0")
    assert result.exit_code == 3


def test_kl_and_same_top(tmp_path: Path) -> None:
    base = make_record(kld=make_kld(0.0001, 99.9))
    lossy = make_record("q4_0:q4_0", 10.2, kld=make_kld(0.05, 90.0))
    result = gate(tmp_path, [base, lossy], {"pair": "*:*", "max_kld": 0.01, "min_same_top_pct": 95})
    assert result.exit_code == 1
    assert result.regressions == [
        "tiny q4_0:q4_0: KL divergence 0.050000 ± 0.002500 from f16/f16, at most 0.01 is allowed.",
        "tiny q4_0:q4_0: same top token 90.000 %, at least 95 % is allowed.",
    ]


def test_decode_path_bound_holds_for_a_mismatch_too(tmp_path: Path) -> None:
    options = {"batched_ubatch": 512, "batched_chunks": 4, "bound_pct": 2.0}
    decode = Decode(ppl_batched=10.1, delta_pct=-7.5, bound_pct=2.0, batched_key=GOOD.key)
    wrong = make_record(
        "q8_0:q8_0",
        status="decode-mismatch",
        detail="x",
        decode=decode,
        metric="decode",
        ubatch=1,
        options=options,
    )
    result = gate(tmp_path, [F16, GOOD, wrong], {"pair": "q8_0:q8_0", "max_decode_pct": 2})
    assert result.exit_code == 1
    assert "7.500 % off" in result.regressions[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pairs = ['f16:f16']", "no [[check]]"),
        ("[sweep]\npairs = ['f16:f16']\n[[check]]\npair = 'f16:f16'", "needs a bound"),
        (
            "[sweep]\npairs = ['f16:f16']\n[[check]]\npair = 'f16:f16'\nmax_pll = 3",
            "perhaps you meant 'max_ppl'",
        ),
        ("[sweep]\npairs = ['f16:f17']\n[[check]]\npair = 'f16:f16'\nmax_ppl = 3", "'f17'"),
        (
            "[sweep]\nparis = ['f16:f16']\n[[check]]\npair = 'f16:f16'\nmax_ppl = 3",
            "perhaps you meant 'pairs'",
        ),
        ("[sweep\n", "is not TOML"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "g.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_gate(path)
    assert words in caught.value.sentence()


def test_the_shipped_configs_are_valid() -> None:
    from turbo_eval.sweep.spec import load_sweep_data
    from turbo_eval.util.paths import configs_dir

    load_gate(configs_dir() / "gates.toml")
    load_gate(configs_dir() / "gates-anchor.toml")
    for name in ("demo", "issue-27", "full", "gates", "gates-anchor"):
        sweep_spec(load_sweep_data(configs_dir() / f"{name}.toml"), name)
