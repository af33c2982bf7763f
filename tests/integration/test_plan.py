"""From options and config to cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import one_sentence
from turbo_eval.commands.options import merged, overrides
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import CACHE_TYPES, kv_mib, parse_pair
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.metrics import METRICS, wanted_metrics
from turbo_eval.records.reference import exact_cell
from turbo_eval.sweep.plan import Plan, make_plan, ordered_pairs
from turbo_eval.sweep.spec import SweepSpec, sweep_spec

BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
BITS |= {"iq4_nl": 4.5, "turbo4": 4.25, "turbo3": 3.25, "turbo2": 2.25}


def spec(**data: Any) -> SweepSpec:
    return sweep_spec({"pairs": ["f16:f16", "q8_0:q4_0"], **data}, "test")


@pytest.fixture
def plan_of(build: Build, smollm: ModelFile, prose: CorpusFile) -> Any:
    def plan(**data: Any) -> Plan:
        return make_plan(spec(**data), build, download=False)

    return plan


def test_bits_per_value() -> None:
    assert {name: t.bpv for name, t in CACHE_TYPES.items()} == BITS


def test_kv_size_is_llama_cpp_s() -> None:
    # llama_kv_cache: size = 4.57 MiB (512 cells, 30 layers), K (q8_0): 2.99 MiB, V (q4_0): 1.58 MiB
    size = kv_mib("q8_0", "q4_0", n_layer=30, n_head_kv=3, dim_k=64, dim_v=64, ctx=512)
    assert size == pytest.approx(4.57, abs=0.005)


def test_pairs() -> None:
    assert parse_pair("q8_0/turbo3") == parse_pair(" q8_0 : turbo3 ") == ("q8_0", "turbo3")
    assert parse_pair("f16") == ("f16", "f16")
    for bad in ("", ":", "a:b:c", "q8_0:"):
        with pytest.raises(UsageError):
            parse_pair(bad)
    assert sweep_spec({"k": ["f16", "q8_0"], "v": ["f16", "q4_0"]}, "t").pairs == (
        *(("f16", "f16"), ("f16", "q4_0"), ("q8_0", "f16"), ("q8_0", "q4_0")),
    )


def names(asked: list[str]) -> list[str]:
    return [metric.name for metric in wanted_metrics(asked)]


def test_metrics_bring_what_they_need() -> None:
    assert names(["ppl", "kld"]) == ["kld"]
    assert names(["decode"]) == ["ppl", "decode"]
    assert names(["greedy", "decode", "kld"]) == ["kld", "decode", "greedy"]


def test_the_baseline_goes_first_and_f16_before_generation() -> None:
    given = spec(pairs=["q4_0:q4_0", "q8_0:q8_0"], baseline="q8_0:q8_0")
    assert ordered_pairs(given)[0] == ("q8_0", "q8_0")
    assert ordered_pairs(spec(pairs=["q4_0:q4_0", "f16:f16"]))[0] == ("f16", "f16")
    assert ordered_pairs(given, METRICS["greedy"])[0] == ("f16", "f16")


def test_cells_multiply_and_repeat_nothing(plan_of: Any) -> None:
    plan = plan_of(ctx=[256, 512], metrics=["kld", "decode"], chunks=2)
    cells = plan.cells()
    assert len(cells) == 8 and len({c.key() for c in cells}) == 8
    assert [(c.ctx, c.metric, c.k) for c in cells[:3]] == [
        *((256, "kld", "f16"), (256, "kld", "q8_0"), (256, "decode", "f16")),
    ]
    twice = plan_of(models=["smollm2-135m", "smollm2-135m"])
    assert len(twice.cells()) == 2


def test_a_decode_cell_finds_its_batched_cell(plan_of: Any) -> None:
    cells = plan_of(metrics=["ppl", "decode"], chunks=3, ubatch=128).cells()
    batched = {c.k: c.key() for c in cells if c.metric == "ppl"}
    for cell in cells:
        if cell.metric == "decode":
            assert (cell.ubatch, cell.chunks) == (1, 2)
            assert cell.batched("ppl").key() == batched[cell.k]


def test_all_pairs_share_one_base(plan_of: Any) -> None:
    cells = plan_of(metrics="kld").cells()
    assert len({exact_cell(c).key() for c in cells}) == 1
    assert (
        len(
            {exact_cell(c).key() for c in plan_of(metrics="kld", chunks=3).cells()}
            | {exact_cell(cells[0]).key()}
        )
        == 2
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model": "a", "models": ["b"]}, "not both"),
        ({"pairs": []}, "no K/V pairs"),
        ({"k": ["f16"]}, "belong together"),
        ({"metrics": ["ppx"]}, "metrics"),
        ({"ctx": 8}, "below 16"),
        ({"decode": {"chunk": 1}}, "perhaps you meant 'chunks'"),
        ({"needle": {"depths": [2.0]}}, "from 0 to 1"),
    ],
)
def test_bad_sweeps(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec(**data)
    assert words in caught.value.sentence()
    assert one_sentence(f"turbo-eval: {caught.value.sentence()}")


def test_options_lie_over_the_config(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('model = "a"\nbaseline = "q8_0:q8_0"\npairs = ["f16:f16", "q8_0:q8_0"]\nchunks = 9\n')
    assert merged(path, {})["chunks"] == 9
    data = merged(path, overrides(models=["b"], pairs="q4_0:q4_0", chunks=None, metrics="kld,decode"))
    found = sweep_spec(data, "t")
    assert (found.models, found.chunks, found.metrics) == (("b",), 9, ("kld", "decode"))
    assert found.against == ("q8_0", "q8_0"), "the file names it, whichever pairs are measured"
    data = merged(path, overrides(against="q4_0:q4_0"))
    assert sweep_spec(data, "t").against == ("q4_0", "q4_0")
    assert sweep_spec(merged(path, overrides(reference=False)), "t").against is None
