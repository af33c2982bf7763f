"""What a sweep shows while it runs: ΔPPL so far with its interval, the time left."""

from __future__ import annotations

import io
import math
from itertools import accumulate
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from tests.support.layouts import LAYOUTS, write_model
from tests.support.records import make_cell, make_record
from turbo_eval.evidence.paired import interval
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.gguf_info import read_gguf_info
from turbo_eval.inputs.models import ModelFile
from turbo_eval.metrics.base import Job
from turbo_eval.sweep.progress import COLUMNS, TerminalReporter
from turbo_eval.sweep.running import RunningDelta, TimeLeft, words_of_delta, words_of_time

BASE, OWN = (2.3, 2.5, 2.1, 2.4), (2.31, 2.49, 2.14, 2.42)  # negative log-likelihoods of chunks


def running(shares: tuple[float, ...]) -> list[float]:
    """Perplexities over the first chunk, the first two, …, as llama.cpp prints them."""
    return [round(math.exp(x / n), 4) for n, x in enumerate(accumulate(shares), start=1)]


def test_the_interval_is_that_of_the_chunks() -> None:
    delta = RunningDelta()
    pairs = list(zip(running(OWN), running(BASE), strict=True))
    first = delta.add(1, *pairs[0])
    assert first is not None and math.isinf(first.high) and "…" not in words_of_delta(first)
    found = [delta.add(n, *pair) for n, pair in enumerate(pairs[1:], start=2)][-1]
    wanted = interval([a - b for a, b in zip(OWN, BASE, strict=True)]).percent()
    assert found is not None and found.chunks == 4
    assert (found.value, found.low, found.high) == pytest.approx(
        (wanted.value, wanted.low, wanted.high), abs=0.01
    )
    assert words_of_delta(found) == f"ΔPPL {found.value:+.2f} (−{-found.low:.2f} … {found.high:+.2f}) %"


def test_missed_chunks_have_no_interval_and_no_number_none() -> None:
    delta = RunningDelta()
    found = delta.add(3, 10.5, 10.0)
    assert found is not None and found.value == pytest.approx(5) and math.isinf(found.high)
    assert delta.add(4, math.nan, 10.0) is None


def test_time_left_goes_by_the_pace() -> None:
    left = TimeLeft({0: 10.0, 1: 10.0, 2: 20.0}, now=100.0)
    assert left.seconds(105.0) == 40.0, "nothing is done: the plan's own estimate"
    left.skip(2)
    left.advance(0, 0.5)
    assert left.seconds(110.0) == pytest.approx(30.0)  # a quarter in ten seconds
    left.advance(0, 1.0)
    left.advance(1, 1.0)
    assert left.seconds(120.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.2, "4 s"), (99.0, "99 s"), (754.0, "13 min"), (3840.0, "1 h 04 min")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert words_of_time(seconds) == words


def test_on_a_terminal(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    path, digest = write_model(LAYOUTS["qwen2"], tmp_path / "tiny.gguf"), "1" * 64
    model = ModelFile("tiny", path, digest, 1, read_gguf_info(path))
    corpus = CorpusFile("prose", path, digest, 1)
    jobs = [Job(make_cell(pair), model, corpus, None) for pair in ("f16:f16", "q4_0:q4_0")]
    with Progress(*COLUMNS, console=console, auto_refresh=False) as progress:
        reporter = TerminalReporter(progress, {0: 1.0, 1: 1.0})
        for number, job in enumerate(jobs):
            reporter.begin(number, job)
        for chunk, (own, base) in enumerate(zip(running(OWN), running(BASE), strict=True), start=1):
            reporter.progress(0, chunk, 4, base)
            reporter.progress(1, chunk, 4, own, base)
        progress.refresh()
        shown = screen.getvalue()
        reporter.end(1, make_record("q4_0:q4_0", 10.4), reused=False)
        reporter.end(0, make_record(), reused=True)
    assert "PPL 10.227" in shown and "ΔPPL +1.51 (−1.80 … +4.93) %" in shown and "left" in shown
    assert "q4_0/q4_0 ppl: PPL 10.4000" in screen.getvalue() and "(on record)" in screen.getvalue()
