"""The exact window in the harness: what is asked for, read back, judged and counted."""

from __future__ import annotations

import pytest

from tests.support.records import make_cell, make_record
from turbo_eval.analysis.recommend import memory_mib
from turbo_eval.analysis.summary import summarize
from turbo_eval.errors import UsageError
from turbo_eval.formats.window import OFF, Window, resolve
from turbo_eval.llama.output import parse_effective
from turbo_eval.metrics.judge import judge_state
from turbo_eval.records.record import Effective
from turbo_eval.util import numbers

LOG = """\
llama_kv_cache: size =    3.97 MiB (   512 cells,  30 layers,  1/1 seqs), K (turbo3):    1.14 MiB, \
V (turbo3):    1.14 MiB, window (q8_0):    1.68 MiB
llama_kv_cache: exact window: recent 128, first 4, type q8_0, 144 cells/seq, 1.68 MiB; \
3.25 bits per value, 5.64 with the window at 512 cells
"""


@pytest.mark.parametrize(
    ("recent", "first", "pair", "window"),
    [
        ("auto", "auto", ("turbo3", "turbo3"), Window(128, 4)),
        ("auto", "auto", ("q8_0", "turbo3"), Window(128, 4)),
        ("auto", "auto", ("q8_0", "q8_0"), OFF),
        (64, "auto", ("f16", "q4_0"), Window(64, 4)),
        (64, 0, ("q4_0", "f16"), Window(64, 0)),
        (0, "auto", ("turbo3", "turbo3"), OFF),
        (0, 4, ("turbo3", "turbo3"), Window(0, 4)),
        (128, 4, ("f16", "f16"), OFF),
    ],
)
def test_what_is_asked_for(recent: int, first: int, pair: tuple[str, str], window: Window) -> None:
    assert resolve(recent, first, *pair) == window


def test_what_llama_cpp_says_is_read_back() -> None:
    ran = parse_effective(LOG)
    assert (ran.recent, ran.first, ran.window_type, ran.window_mib) == (128, 4, "q8_0", 1.68)
    assert (ran.kv_mib, ran.window_bits) == (3.97, 5.64)
    mixed = parse_effective(LOG.replace("K (turbo3)", "K (turbo3+q8_0)"))  # a layer of the anchor's
    assert (mixed.k, mixed.k_mib) == ("turbo3", 1.14)
    off = parse_effective("llama_kv_cache: exact window: off (not wanted)\n")
    assert (off.recent, off.first, off.window_mib) == (0, 0, None)
    assert parse_effective("").recent is None


def test_another_window_than_asked_for_is_no_number() -> None:
    cell = make_cell("turbo3:turbo3", recent=128, first=4)
    assert judge_state(cell, Effective(k="turbo3", v="turbo3", recent=128, first=4)) is None
    for ran in (Effective(k="turbo3", v="turbo3"), Effective(k="turbo3", v="turbo3", recent=64, first=4)):
        fault = judge_state(cell, ran)
        assert fault is not None and fault[0] == "state-mismatch" and "window was to be 128+4" in fault[1]


def test_its_memory_is_the_same_at_any_context() -> None:
    plain, windowed = make_record("turbo3:turbo3", 10.0), make_record("turbo3:turbo3", 10.0)
    plain = plain.model_copy(update={"effective": Effective(kv_mib=2.0, ctx=512)})
    ran = Effective(kv_mib=3.0, window_mib=1.0, ctx=512)
    windowed = windowed.model_copy(update={"effective": ran})
    sizes = [memory_mib(summarize([r])[0], None, 5120) for r in (plain, windowed)]  # type: ignore[arg-type]
    assert sizes == [20.0, 21.0]


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "lots", "", "1e9"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--recent"):
        numbers.tokens_or_auto("--recent", text)
