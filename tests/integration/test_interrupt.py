"""Ctrl-C at any moment: no traceback, and the exit that a shell expects."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def catches(pid: int) -> bool:
    """Does the process handle SIGINT itself? Python does from its own start on, and our first line ends that
    until everything is loaded: before it, an interrupt is the interpreter's affair."""
    text = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in text.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def wait_until(process: subprocess.Popen[str], wanted: bool) -> None:
    until = time.monotonic() + 60
    while process.poll() is None and catches(process.pid) != wanted and time.monotonic() < until:
        time.sleep(0.001)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("moment", range(20))
def test_an_interrupt_in_the_first_second_leaves_no_traceback(moment: int, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "turbo-eval"), "doctor"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(process, True)
    wait_until(process, False)
    assert process.poll() is None
    time.sleep(moment / 20)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "KeyboardInterrupt" not in err, err
    assert process.returncode in (0, 130, -signal.SIGINT, 4), (process.returncode, err)
