"""llama.cpp's tools as tests run them, and the KL divergence that llama-perplexity prints."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from turbo_eval.llama.build import Build
from turbo_eval.util.process import child_environment


def tool(build: Build, name: str, *args: object, ok: bool = True, verbosity: int = 4) -> str:
    """What a tool says, run on the CPU with one thread; `ok`: whether it must end well."""
    argv = [str(build.tool(name)), *map(str, args), "--device", "none", "-fit", "off", "-t", "1"]
    argv += ["--log-colors", "off", "--no-log-prefix", "--no-log-timestamps", "--verbosity", str(verbosity)]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        errors="replace",  # random models write random bytes
        stdin=subprocess.DEVNULL,
        env=child_environment()[0],
        timeout=600,
    )
    said = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, said[-2000:]
    return said


class Divergence:
    """KL divergence over the first chunks of a text from a cache of type `base` without anchor.

    f32 goes without Flash Attention, which would make f16 of it.
    """

    def __init__(
        self,
        build: Build,
        model: Path,
        text: Path,
        folder: Path,
        *args: str,
        base: str = "f16",
        chunks: int = 1,
    ) -> None:
        self._build = build
        self._args = ["-m", model, "-f", text, "-c", "256", "--chunks", chunks, "--no-warmup", *args]
        self._base = folder / "base.kld"
        self._perplexity(base, "off")

    def run(self, kind: str, anchor: str | Path) -> tuple[float, str]:
        """Mean KLD in nats and the line on the anchor's state."""
        said = self._perplexity(kind, anchor, "--kl-divergence")
        mean = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", said)
        state = re.search(r"^kv_anchor: .*$", said, re.M)
        assert mean and state, said[-2000:]
        return float(mean[1]), state[0]

    def _perplexity(self, kind: str, anchor: str | Path, *args: str) -> str:
        cache = ["-ctk", kind, "-ctv", kind, "-fa", "off" if kind == "f32" else "on", "--kv-anchor", anchor]
        cache += ["--kv-recent", "0"]  # the cache alone
        base = ["--kl-divergence-base", self._base]
        return tool(self._build, "llama-perplexity", *self._args, *cache, *base, *args)
