"""Numbers that are none: refused with one sentence and no traceback, from files and options."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.golden import World, world
from tests.support.harness import one_sentence
from tests.support.inside import call
from turbo_eval.util import numbers

SWEEP = {
    "chunks": ("0", "-1", "1.5", "nan", "inf", "true", '"8"', "999999999999"),
    "ctx": ("8", "[512, nan]", "true", "1e400"),
    "ubatch": ("0", "false", "-inf"),
    "threads": ("0", "-2", "2.5", "1000000"),
    "timeout": ("0", "-1", "nan", "inf", "true"),
    "decode": ("{ bound_pct = nan }", "{ bound_pct = true }", "{ chunks = 0 }"),
    "needle": ("{ depths = [nan] }", "{ depths = [1.5] }", "{ lengths = [true] }"),
}
CHECK = {
    "max_ppl": ("nan", "inf", "-inf", "true", "0", "-3", '"10"'),
    "max_delta_pct": ("nan", "inf", "true", "-inf"),
    "max_kld": ("nan", "inf", "-0.1", "true"),
    "min_same_top_pct": ("nan", "-1", "101", "true"),
    "max_decode_pct": ("nan", "-1", "inf"),
}
FILES = [("sweep", k, v) for k, values in SWEEP.items() for v in values]
FILES += [("check", k, v) for k, values in CHECK.items() for v in values]

OPTIONS = [
    *[("recommend", "--max-delta-ppl", v) for v in ("nan", "inf", "nan%", "three", "")],
    *[("recommend", "--max-kld", v) for v in ("nan", "-0.1", "inf", "x")],
    *[("recommend", "--memory", v) for v in ("nan", "-1", "0", "inf", "2GiB")],
    *[("recommend", "--ctx", v) for v in ("0", "-1", "1.5", "nan")],
    *[("plan", "--chunks", v) for v in ("0", "-1", "nan", "1e3", "1_000", "999999999999")],
    *[("plan", "--ctx", v) for v in ("many", "nan", "-512", "512,inf", "8", ",")],
    *[("sweep", "--timeout", v) for v in ("nan", "-1", "inf", "0")],
    *[("sweep", "--threads", v) for v in ("0", "nan", "-3", "x")],
    *[("sweep", "--retries", v) for v in ("-1", "nan")],
    *[("sweep", "--patience", v) for v in ("nan", "-5", "inf")],
    *[("sweep", "--jobs", v) for v in ("0", "nan")],
    *[("bench", "--depths", v) for v in ("-1", "nan", "many", "0,1.5")],
    *[("bench", "--reps", v) for v in ("0", "nan")],
]


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.mark.parametrize(("where", "key", "value"), FILES)
def test_bad_number_in_a_file(place: World, where: str, key: str, value: str) -> None:
    path = place.folder / "bad.toml"
    bound = f"{key} = {value}" if where == "check" else "max_ppl = 11"
    extra = f"{key} = {value}" if where == "sweep" else ""
    head = f'[sweep]\nmodel = "{place.model}"\ncorpus = "{place.corpus}"\npairs = ["f16:f16", "q8_0:q8_0"]\n'
    path.write_text(f'{head}{extra}\n[[check]]\npair = "q8_0:*"\n{bound}\n')
    code, out, err = call("gate", path, "--bin-dir", place.bin, "--results", place.whole)
    assert code == 2, (out, err)
    assert one_sentence(err) and key in err, err
    assert out == ""


@pytest.mark.parametrize(("command", "option", "value"), OPTIONS)
def test_bad_number_on_the_command_line(place: World, command: str, option: str, value: str) -> None:
    what = [str(place.model)] if command == "recommend" else ["--model", str(place.model)]
    if command in ("plan", "sweep"):
        what += ["--corpus", str(place.corpus), "--pairs", "f16:f16,q8_0:q8_0"]
    args = [command, *what, f"{option}={value}", "--bin-dir", str(place.bin)]
    if command != "bench":
        args += ["--results", str(place.whole)]
    code, out, err = call(*args)
    assert code == 2, (out, err)
    assert one_sentence(err) and option in err, err
    assert out == ""


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "many"])
def test_bad_number_in_the_environment(place: World, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TURBO_EVAL_LOGITS_GIB", value)
    args = ("plan", "--model", place.model, "--corpus", place.corpus, "--pairs", "q8_0:q8_0", "--chunks", "4")
    code, _, err = call(*args, "--metrics", "kld", "--bin-dir", place.bin, "--results", place.whole)
    assert code == 2 and one_sentence(err) and "TURBO_EVAL_LOGITS_GIB" in err


KINDS = [kind for kind in vars(numbers).values() if isinstance(kind, numbers.Kind)]


@given(st.sampled_from(KINDS), st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.none()))
def test_what_a_kind_lets_through_is_finite_and_in_range(kind: numbers.Kind, value: object) -> None:
    try:
        found = kind.check(value)
    except ValueError as error:
        assert "; give " in str(error)
        return
    assert not isinstance(value, bool) and math.isfinite(found) and found == value
    assert kind.low is None or found >= kind.low
    assert kind.high is None or found <= kind.high
    assert kind.above is None or found > kind.above
    assert not kind.whole or isinstance(found, int)


@given(st.sampled_from(KINDS), st.text(max_size=12))
def test_any_text_is_read_or_refused_with_a_reason(kind: numbers.Kind, text: str) -> None:
    try:
        assert math.isfinite(kind.parse(text))
    except ValueError as error:
        assert "; give " in str(error)


@given(st.sampled_from(KINDS), st.one_of(st.floats(allow_nan=False), st.integers()))
def test_file_and_command_line_agree(kind: numbers.Kind, value: float) -> None:
    def attempt(read: object) -> object:
        try:
            return read()  # type: ignore[operator]
        except ValueError:
            return "refused"

    if kind.whole and isinstance(value, float):
        return  # "8.0" is a whole number in a file; on the command line it is written as one
    assert attempt(lambda: kind.parse(repr(value))) == attempt(lambda: kind.check(value))
