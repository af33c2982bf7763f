"""The runner on small real processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.metrics.judge import judge_process
from turbo_eval.util.process import Outcome, child_environment, relevant_environment, run

ENV = {"PATH": "/usr/bin:/bin"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_both_streams_in_order_to_log_and_callback(tmp_path: Path) -> None:
    seen: list[str] = []
    code = "import sys,os; os.write(1,b'a\\n'); os.write(2,'\u00b1\\n'.encode()); os.write(1,b'c\\n')"
    outcome = run(python(code), log=tmp_path / "x" / "log", env=ENV, on_text=lambda t: seen.append(t))
    assert outcome.text == "".join(seen) == (tmp_path / "x" / "log").read_text() == "a\n±\nc\n"
    assert (outcome.returncode, outcome.timed_out) == (0, False)
    assert outcome.peak_mib > 1 and outcome.seconds > 0


@pytest.mark.parametrize(
    ("limit", "words"), [({"timeout": 1.0}, "within 1 s"), ({"silence": 1.0}, "said nothing")]
)
def test_a_hanging_process_is_ended(tmp_path: Path, limit: dict[str, Any], words: str) -> None:
    outcome = run(
        python("import time; print(1, flush=True); time.sleep(99)"), log=tmp_path / "l", env=ENV, **limit
    )
    assert outcome.timed_out and outcome.seconds < 30
    verdict = judge_process(outcome, limit.get("timeout"))
    assert verdict is not None and verdict[0] == "timeout" and words in verdict[1]


def test_its_children_are_ended_too(tmp_path: Path) -> None:
    code = "import subprocess,time; print(subprocess.Popen(['sleep','99']).pid, flush=True); time.sleep(99)"
    outcome = run(python(code), log=tmp_path / "l", env=ENV, timeout=2.0)
    state = Path(f"/proc/{int(outcome.text)}/stat")

    def gone() -> bool:
        try:
            return state.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # The signal is sent; on a busy machine the kernel takes a moment to deliver it.
    until = time.monotonic() + 10
    while not gone() and time.monotonic() < until:
        time.sleep(0.05)
    assert gone()


def test_stopped_by_the_callback(tmp_path: Path) -> None:
    outcome = run(
        python("import time; print('bad', flush=True); time.sleep(99)"),
        log=tmp_path / "l",
        env=ENV,
        on_text=lambda text: "bad" in text,
    )
    assert outcome.stopped and outcome.returncode is None


def test_signal_names_and_reasons() -> None:
    crashed = Outcome(-11, False, False, "x\nGGML_ASSERT(a) failed\n", "", 1, 1, 1)
    assert judge_process(crashed, None) == ("crash", "killed by SIGSEGV: GGML_ASSERT(a) failed")
    odd = Outcome(3, False, False, "", "", 1, 1, 1)
    assert judge_process(odd, None) == ("crash", "exit code 3: it gave no reason")


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be started"):
        run([tmp_path / "none"], log=tmp_path / "l", env=ENV)


def test_the_clock_may_run_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations come from the monotonic clock; the wall clock only dates the record."""
    import turbo_eval.util.process as runner

    ticks = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: next(ticks))
    outcome = run(python("pass"), log=tmp_path / "l", env=ENV, timeout=60)
    assert outcome.returncode == 0 and 0 < outcome.seconds < 60
    assert runner.seconds_in_children() > 0


def test_environment() -> None:
    given = {
        "LLAMA_ARG_CTX_SIZE": "1",
        "LLAMA_ATTN_ROT_DISABLE": "1",
        "GGML_X": "2",
        "HOME": "/",
        "LC_ALL": "de_DE",
    }
    env, removed = child_environment(given)
    assert removed == ("LLAMA_ARG_CTX_SIZE",) and env["LC_ALL"] == "C" and env["HOME"] == "/"
    assert relevant_environment(given) == {"GGML_X": "2", "LLAMA_ATTN_ROT_DISABLE": "1"}
