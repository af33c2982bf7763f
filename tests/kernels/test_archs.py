"""Every architecture at the pin, as a small random model: cache types, K anchor and exact window."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.support.archs import KNOWN, TOOL, TYPES, Case, answers, run
from turbo_eval.anchor import inspect as ask
from turbo_eval.anchor.facts import read_facts
from turbo_eval.formats.cache_types import CACHE_TYPES
from turbo_eval.llama.build import Build
from turbo_eval.util import paths

pytestmark = pytest.mark.build

NAMED = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "qwen3next",
    "gemma3",
    "gemma4",
    "gpt-oss",
    "deepseek2",
    "falcon-h1",
    "phi3",
    "olmo2",
    "glm4",
    "command-r",
)
# with a bias of K that a quantizer cannot take
BIASED = ("llama", "qwen2", "phi3", "glm4")
SINKS = ("gpt-oss", "granite_swa")
ODD_HEADS = ("laguna", "step35")
# layers that keep keys and values, of two; Falcon-H1's are both attention and recurrent
HYBRIDS = {"qwen3next": 1, "qwen35": 1, "lfm2": 1, "granitehybrid": 1, "plamo2": 1, "falcon-h1": 2}

LAYERS = re.compile(r"anchor: (\d+)/(\d+) layers, balance: (\d+)/(\d+) layers from weights")


class Ran:
    """What the test printed, by architecture and case, and the models it ran."""

    def __init__(self, cases: list[Case], said: str, models: Path) -> None:
        self.cases, self.said, self.models = cases, said, models

    def case(self, arch: str, name: str) -> Case:
        return next(case for case in self.cases if (case.arch, case.name) == (arch, name))


@pytest.fixture(scope="session")
def ran(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    if not (build.bin_dir / TOOL).is_file():
        pytest.skip(f"the build in {build.bin_dir} has no {TOOL}")
    models = tmp_path_factory.mktemp("architectures")
    return Ran(*run(build.tool(TOOL), "-o", str(models)), models)


def test_nothing_fails(ran: Ran) -> None:
    failed = [case for case in ran.cases if case.status == "FAIL"]
    assert not failed and ran.said.endswith("exit code 0"), (failed, ran.said)
    assert len({case.arch for case in ran.cases}) >= 120
    assert all(math.isfinite(case.kld) for case in ran.cases if case.status == "OK")
    assert all(case.said for case in ran.cases if case.status == "REFUSED")


@pytest.mark.parametrize("arch", NAMED)
def test_anchor_is_exact_or_off_by_name(ran: Ran, arch: str) -> None:
    exact, off, on = (ran.case(arch, name) for name in ("exact", "turbo4 off", "turbo4"))
    if "-> on" not in exact.said:
        assert re.search(r"on -> off \(\w.*\)", exact.said)
        return
    assert exact.kld <= 2e-6
    assert on.kld <= 0.02
    assert on.kld <= 0.04 * off.kld
    assert arch not in BIASED or off.kld > 0.5


@pytest.mark.parametrize("arch", ODD_HEADS)
def test_heads_that_blocks_do_not_divide_are_filled_up(ran: Ran, arch: str) -> None:
    assert ran.case(arch, "turbo4").kld <= 0.02 < 0.5 < ran.case(arch, "turbo4 off").kld
    refused = "K cache type q8_0 with block size 32 does not divide n_embd_head_k=80"
    assert refused in ran.case(arch, "q8_0").said


@pytest.mark.parametrize("arch", SINKS)
def test_sinks_follow_the_anchor(ran: Ran, arch: str) -> None:
    exact, off, on = (ran.case(arch, name) for name in ("exact", "turbo4 off", "turbo4"))
    assert "-> on" in exact.said and exact.kld <= 2e-6
    assert on.kld <= 0.02 and on.kld <= 0.04 * off.kld


@pytest.mark.parametrize("arch", NAMED)
def test_window_is_exact_or_refused_by_name(ran: Ran, arch: str) -> None:
    window, plain = ran.case(arch, "window"), ran.case(arch, "f16")
    if window.status == "REFUSED":
        assert "the model caches compressed keys (MLA)" in window.said
        return
    assert window.window.startswith("recent 256, first 4, type f16")
    assert window.kld <= 2 * plain.kld + 1e-4
    near = ran.case(arch, "turbo3 recent")
    assert near.kld < 0.1 * ran.case(arch, "turbo3").kld


@pytest.mark.parametrize(("arch", "layers"), HYBRIDS.items())
def test_layers_of_hybrids(ran: Ran, arch: str, layers: int) -> None:
    found = LAYERS.search(ran.case(arch, "exact").said)
    assert found and int(found[2]) == int(found[4]) == layers
    assert "nan" not in ran.case(arch, "exact").said


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("deepseek2", "multi-head latent attention"),
        ("deepseek4", "the architecture has a cache of its own kind"),
        ("mamba", "the model has no KV cache"),
        ("gemma2", "attention logit soft-capping"),
        ("bloom", "ALiBi"),
        ("gpt2", "no RoPE"),
    ],
)
def test_why_the_anchor_is_off(ran: Ran, arch: str, sentence: str) -> None:
    assert f"off ({sentence})" in ran.case(arch, "exact").said


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("deepseek2", "the model caches compressed keys (MLA)"),
        ("minimax-m3", "the model selects keys by an index"),
        ("mamba", "the model has no KV cache"),
        ("grok", "quantized V cache requires flash_attn to be enabled"),
    ],
)
def test_why_a_cache_is_refused(ran: Ran, arch: str, sentence: str) -> None:
    assert sentence in ran.case(arch, "window").said


def test_every_reason_is_known_to_these_tests(ran: Ran) -> None:
    """A new one wants a line above."""
    reasons = {answer[part] for answer in answers(ran.cases).values() for part in ("anchor", "window")}
    source = Path(__file__).read_text(encoding="utf-8")
    assert not [reason for reason in reasons - {"on"} if reason not in source]


def test_the_table_says_what_the_build_does(ran: Ran) -> None:
    known = json.loads((paths.repo_root() / KNOWN).read_text(encoding="utf-8"))
    found = answers(ran.cases)
    parts = ("anchor", "window", "types")
    assert {arch: [a[p] for p in parts] for arch, a in found.items()} == {
        arch: [a[p] for p in parts] for arch, a in known.items()
    }, "python -m tests.support.archs writes it anew"


def test_inspect_foretells_all_of_them(ran: Ran) -> None:
    """From the files alone."""
    found = answers(ran.cases)
    wrong: list[object] = []
    for path in sorted(ran.models.glob("*.gguf")):
        arch = path.stem.removesuffix("-dense").removesuffix("-moe")
        facts = read_facts(path)
        anchor, answer = ask.anchor(facts), found[arch]
        if anchor.works != (answer["anchor"] == "on") or (
            not anchor.works and anchor.why != answer["anchor"]
        ):
            wrong.append((path.name, "anchor", anchor, answer["anchor"]))
        counted = LAYERS.search(ran.case(arch, "exact").said)
        if counted and int(counted[2]) != len(facts.layers):
            wrong.append((path.name, "layers", len(facts.layers), counted[0]))
        for name in TYPES:
            works = ask.cache_type(facts, CACHE_TYPES[name]).works
            if works != (answer["types"][name] == "on") and facts.layers:
                wrong.append((path.name, name, works, answer["types"][name]))
    assert not wrong
