"""A llama-server as a child: its log goes through, signals reach it, its end is ours."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import httpx2

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.llama.output import last_error, refusal
from turbo_eval.util import paths
from turbo_eval.util.process import die_with_parent

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL = 200  # lines of the log kept to find the reason of an end
_WAIT = 0.1  # seconds between two looks at /health


def option(argv: Sequence[str], *names: str, variable: str = "", default: str = "") -> str:
    """The value that the last of `names` in `argv` has, else that of the environment variable."""
    value = os.environ.get(variable, default) if variable else default
    for here, following in itertools.pairwise(argv):
        if here in names:
            value = following
    return value


def _answers(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except (OSError, ValueError, OverflowError):
        return False


class Server:
    """Starts when made; `wait` for its end in the main thread, where signals arrive.

    Raises:
        EnvironmentProblem: it can't be started, or its port is taken.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        host = option(argv, "--host", variable="LLAMA_ARG_HOST", default="127.0.0.1")
        port = option(argv, "--port", variable="LLAMA_ARG_PORT", default="8080")
        key = option(argv, "--api-key", variable="LLAMA_API_KEY").split(",")[0]
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        if _answers(host, port):  # else its /health would be taken for ours
            raise EnvironmentProblem(f"something listens on port {port} of {host}", "take another --port")
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self._old: dict[int, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []
        # before it starts: a signal in between would leave it running
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._old[number] = signal.signal(number, self._pass_on)
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            self._restore()
            raise EnvironmentProblem(
                f"{argv[0]} cannot be started: {error.strerror}", paths.step("build-cpu", "build cpu")
            ) from None
        for pending in self._pending:
            self._process.send_signal(pending)
        self._reader = threading.Thread(target=self._copy, daemon=True)
        self._reader.start()

    def ready(self) -> bool:
        """Wait until it answers; False if it ended before."""
        while self._running.poll() is None:
            if self._get("/health") is not None:
                return True
            time.sleep(_WAIT)
        return False

    def props(self) -> Mapping[str, Any]:
        """What it says of itself; nothing if it doesn't."""
        return self._get("/props") or {}

    def wait(self) -> int:
        """Its exit code, as a shell has it: 128 + n for a signal."""
        code = self._running.wait()
        self._reader.join(timeout=5)
        self._restore()
        return 128 - code if code < 0 else code

    def reason(self) -> str:
        """Why it ended, in its own words."""
        text = "\n".join(self._tail)
        said = refusal(text) or last_error(text) or (self._tail[-1] if self._tail else "it said nothing")
        return said.strip()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _get(self, path: str) -> dict[str, Any] | None:
        try:
            answer = httpx2.get(self.url + path, headers=self._headers, timeout=5, trust_env=False)
            found = answer.json() if answer.status_code == 200 else None
        except (httpx2.HTTPError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _copy(self) -> None:
        stream = self._running.stdout
        assert stream is not None
        for raw in stream:
            line = raw.decode("utf-8", "replace")
            self._tail.append(line.rstrip("\n"))
            sys.stderr.write(line)
            sys.stderr.flush()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._pending.append(number)
        elif self._process.poll() is None:
            self._process.send_signal(number)

    def _restore(self) -> None:
        for signal_number, handler in self._old.items():
            signal.signal(signal_number, handler)
