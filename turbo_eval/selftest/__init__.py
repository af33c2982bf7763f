"""Codebook, layout and kernel self-test of a build: the first thing to run on new hardware."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.formats.window import DEFAULT, Window
from turbo_eval.llama.build import Build
from turbo_eval.selftest.checks import all_checks
from turbo_eval.util import python
from turbo_eval.util.process import child_environment


@dataclass(frozen=True)
class Line:
    """One check's outcome; `ok` None: the device does not offer it and need not."""

    name: str
    ok: bool | None
    detail: str


class Selftest:
    """Runs the checks in a worker process; one that dies costs the check that killed it, not the rest.

    Attributes:
        device: "name: description" of the ggml device, once a check has run.
    """

    def __init__(self, build: Build, backend: str, device: str = "", window: Window = DEFAULT) -> None:
        self._window = window
        self._asked = {
            "bin_dir": str(build.bin_dir),
            "backend": backend,
            "device": device,
            "window": [window.recent, window.first],
        }
        self.device = ""

    def run(self, names: list[str] | None = None) -> Iterator[Line]:
        """Yield one line a check.

        Raises:
            EnvironmentProblem: no such device, or the build's libraries cannot be loaded.
        """
        left = list(all_checks(self._window)) if names is None else list(names)
        while left:
            yield from self._session(left)

    def _session(self, left: list[str]) -> Iterator[Line]:
        """One worker; takes the checks it got through off `left`."""
        asked = json.dumps(self._asked | {"checks": left})
        env, _ = child_environment()
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                python.command("-m", "turbo_eval.selftest.worker", asked),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=env,
            ) as worker,
        ):
            assert worker.stdout is not None
            running = ""
            try:
                for text in worker.stdout:
                    line = self._read(text)
                    if "error" in line:
                        raise EnvironmentProblem(
                            f"the build in {self._asked['bin_dir']} cannot be tested: {line['error']}",
                            "build it for this machine, or name another --backend or --device",
                        )
                    if "device" in line:
                        self.device = str(line["device"])
                    elif "ok" in line:
                        running = ""
                        left.remove(str(line["check"]))
                        yield Line(str(line["check"]), line["ok"], str(line["detail"]))  # type: ignore[arg-type]
                    elif "check" in line:
                        running = str(line["check"])
            except BaseException:
                worker.kill()
                raise
            code = worker.wait()
            said.seek(0)
            reason = _last_words(said.read().decode(errors="replace"))
        if not left:
            return
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not running:
            raise EnvironmentProblem(
                f"the build in {self._asked['bin_dir']} cannot be tested ({how}): {reason}",
                "build it for this machine",
            )
        left.remove(running)
        yield Line(running, False, f"it crashed ({how}): {reason}")

    @staticmethod
    def _read(text: str) -> dict[str, object]:
        try:
            line = json.loads(text)
        except ValueError:
            return {}  # a driver that talks on stdout
        return line if isinstance(line, dict) else {}


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    stated = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line or "rror" in line]
    return (stated or lines or ["it gave no reason"])[-1][:200]
