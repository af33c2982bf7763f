"""Run the command line as a user does, and put a faulty llama-perplexity in front of the real one."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Cli:
    """turbo-eval with fixed --results and --bin-dir; one thread, so that busy machines stay quick."""

    results: Path
    bin_dir: Path
    cache: Path | None = None

    def command(self, *args: str | Path) -> list[str]:
        return [sys.executable, "-m", "turbo_eval", *map(str, args)]

    def env(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "COLUMNS": "200", **(extra or {})}

    def run(self, *args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, env=self.env(env), timeout=600
        )

    def sweep_args(self, *args: str | Path, bin_dir: Path | None = None) -> list[str | Path]:
        place: list[str | Path] = [
            "--bin-dir",
            bin_dir or self.bin_dir,
            "--results",
            self.results,
            "--threads",
            "1",
        ]
        return ["sweep", *args, *place]

    def sweep(
        self, *args: str | Path, bin_dir: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run(*self.sweep_args(*args, bin_dir=bin_dir), env=env)

    def on_a_terminal(self, *args: str | Path) -> tuple[int, str]:
        """Exit code and all that was written to a pseudo-terminal, without its control sequences."""
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "rb", buffering=0) as screen:
            env = self.env({"TERM": "xterm-256color"})
            process = subprocess.Popen(
                self.command(*args), env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
            )
            os.close(theirs)
            said = bytearray()
            with suppress(OSError):  # Linux's way to say that the other side is closed
                while part := screen.read(4096):
                    said += part
        return process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())

    def records(self) -> list[dict[str, Any]]:
        """Every record under the results folder, as JSON."""
        return [json.loads(p.read_text()) for p in sorted(self.results.rglob("*.json"))]


QUICK = ("--chunks", "1", "--ctx", "64")


def faulty(folder: Path, real: Path, rule: str, name: str = "llama-perplexity") -> Path:
    """A bin folder whose tool `name` runs `rule` (shell, the arguments in "$@") and then becomes the real
    one. llama-perplexity is there in any case, without llama-kv-eval unless that is the tool."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in {"llama-perplexity", name}:
        tool = folder / each
        said = rule if each == name else ""
        tool.write_text(f'#!/bin/bash\nREAL={real / each}\n{said}\nexec "$REAL" "$@"\n')
        tool.chmod(0o755)
    return folder


def one_sentence(text: str) -> bool:
    """The message is a single line from turbo-eval and no traceback."""
    lines = [line for line in text.splitlines() if line.startswith("turbo-eval: ")]
    return len(lines) == 1 and "Traceback" not in text
