"""Run one process: stream its output to a log and a callback, time it, end it when it hangs."""

from __future__ import annotations

import codecs
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.util import paths
from turbo_eval.util.files import writing

_PR_SET_PDEATHSIG = 1
# A process that says nothing for this long hangs: llama-perplexity speaks after every chunk.
SILENCE_LIMIT = 3600.0


@dataclass(frozen=True)
class Outcome:
    """What a process did.

    Attributes:
        returncode: as subprocess has it: negative for a signal; None if we ended it.
        timed_out: it outlived its limit, or said nothing for too long, and was ended.
        stopped: the callback asked for its end.
        text: everything it wrote, both streams in order.
        started: UTC, ISO 8601.
        seconds, cpu_seconds: wall and processor time; peak_mib: resident memory.
    """

    returncode: int | None
    timed_out: bool
    stopped: bool
    text: str
    started: str
    seconds: float
    cpu_seconds: float
    peak_mib: float

    def signal_name(self) -> str | None:
        """ "SIGSEGV" etc. if a signal ended it."""
        if self.returncode is None or self.returncode >= 0:
            return None
        try:
            return signal.Signals(-self.returncode).name
        except ValueError:
            return f"signal {-self.returncode}"


def child_environment(base: Mapping[str, str] | None = None) -> tuple[dict[str, str], tuple[str, ...]]:
    """The environment for llama.cpp's tools, and the names taken out of it.

    LLAMA_ARG_* set options behind the command line's back, so they are removed: the argv kept in
    the record is then the whole request. Other GGML_* and LLAMA_* variables stay, are recorded
    and are part of a cell's identity.
    """
    base = os.environ if base is None else base
    removed = tuple(sorted(n for n in base if n.startswith(("LLAMA_ARG_", "LLAMA_LOG_"))))
    env = {n: x for n, x in base.items() if n not in removed}
    env["LC_ALL"] = "C"
    return env, removed


def relevant_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The GGML_* and LLAMA_* variables that llama.cpp's tools will see."""
    kept, _ = child_environment(env)
    return {n: kept[n] for n in sorted(kept) if n.startswith(("GGML_", "LLAMA_")) and n not in _HARMLESS}


# Where libraries lie and what is printed, not what is computed.
_HARMLESS = frozenset({"LLAMA_CPP_LIB_PATH", "LLAMA_CACHE", "LLAMA_TRACE", "GGML_NO_BACKTRACE"})


def die_with_parent() -> None:
    """In the child: be killed when turbo-eval is, so that kill -9 leaves no orphan computing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str],
    timeout: float | None = None,
    silence: float = SILENCE_LIMIT,
    on_text: Callable[[str], bool | None] | None = None,
    cwd: Path | None = None,
) -> Outcome:
    """Run `argv`, copying its output to `log` as it comes.

    Args:
        timeout: seconds it may take in all.
        silence: seconds it may go without any output.
        on_text: gets each piece of output; returns True to end the process.

    Raises:
        EnvironmentProblem: it cannot be started, or the log cannot be written.
        KeyboardInterrupt: passed on after the process was ended.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begin = time.monotonic()
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        sink = log.open("wb", buffering=0)
    with sink:
        process = _start(argv, env, cwd)
        watch = _Watch(process, begin, timeout, silence, on_text)
        try:
            for piece in watch.pieces():
                with writing(log):
                    sink.write(piece)
                watch.take(piece)
        except BaseException:
            _end(process)
            raise
        if watch.timed_out or watch.stopped:
            _end(process)
    returncode, cpu_seconds, peak_mib = _reap(process)
    _CHILDREN.append(time.monotonic() - begin)
    return Outcome(
        returncode=None if watch.timed_out or watch.stopped else returncode,
        timed_out=watch.timed_out,
        stopped=watch.stopped,
        text="".join(watch.texts),
        started=started,
        seconds=round(_CHILDREN[-1], 3),
        cpu_seconds=round(cpu_seconds, 3),
        peak_mib=round(peak_mib, 1),
    )


def _start(argv: Sequence[str | Path], env: Mapping[str, str], cwd: Path | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [str(a) for a in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,  # Ctrl-C reaches us alone; we end the child
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise EnvironmentProblem(
            f"{argv[0]} cannot be started: {error.strerror}", paths.step("build-cpu", "build cpu")
        ) from None


class _Watch:
    """Reads a process's output until it ends, takes too long, or its reader has heard enough."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        begin: float,
        timeout: float | None,
        silence: float,
        on_text: Callable[[str], bool | None] | None,
    ) -> None:
        self.timed_out = self.stopped = False
        self.texts: list[str] = []
        self._process, self._begin, self._heard = process, begin, begin
        self._timeout, self._silence, self._on_text = timeout, silence, on_text
        # a read may end inside a character
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pieces(self) -> Iterator[bytes]:
        """What it writes, as it comes."""
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not self.stopped:
                left = self._left()
                if left <= 0:
                    self.timed_out = True
                    return
                if not selector.select(min(left, 1.0)):
                    if self._process.poll() is not None:
                        return  # a grandchild may still hold the pipe; the tool itself is done
                    continue
                piece = os.read(stream.fileno(), 1 << 16)
                if not piece:
                    return
                self._heard = time.monotonic()
                yield piece

    def _left(self) -> float:
        """Seconds until it has taken too long, or been silent for too long."""
        now = time.monotonic()
        left = self._silence - (now - self._heard)
        return left if self._timeout is None else min(left, self._timeout - (now - self._begin))

    def take(self, piece: bytes) -> None:
        """Keep a piece and let the reader see it."""
        text = self._decoder.decode(piece)
        self.texts.append(text)
        if self._on_text and self._on_text(text):
            self.stopped = True


_CHILDREN: list[float] = []


def seconds_in_children() -> float:
    """Wall seconds that this process has spent in `run` so far: what is not the harness's own."""
    return sum(_CHILDREN)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started, at once: it keeps no state that an orderly end would save."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def _reap(process: subprocess.Popen[bytes]) -> tuple[int, float, float]:
    """Return code, processor seconds and peak resident MiB of the ended process."""
    if process.stdout:
        process.stdout.close()
    if process.returncode is not None:  # poll() has reaped it already; usage is lost
        return process.returncode, 0.0, 0.0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit
