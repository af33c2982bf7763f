"""A llama-server of the build, for tests: started on a free port, asked over HTTP, stopped."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

from turbo_eval.llama.build import Build
from turbo_eval.util.process import child_environment, die_with_parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Answer:
    """A completion: tokens, their log-probabilities in nats, and the whole reply."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    reply: dict[str, Any] = field(repr=False)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were taken from the cache."""
        return int(self.reply["timings"]["cache_n"])


class LlamaServer:
    """Running from `started` on; `log` is what it printed so far."""

    def __init__(self, argv: Sequence[str], url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.argv, self.url, self.process, self._log = argv, url, process, log
        self.http = httpx2.Client(base_url=url, timeout=300, trust_env=False)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)

    def get(self, path: str) -> Any:
        reply = self.http.get(path)
        reply.raise_for_status()
        return reply.json()

    def post(self, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: str | Sequence[int], n: int, **options: Any) -> Answer:
        """Greedy completion of `n` tokens with the log-probability of each."""
        body = {
            "prompt": prompt, "n_predict": n, "temperature": 0, "n_probs": 1, "ignore_eos": True,
            "return_tokens": True, "cache_prompt": False,
        }  # fmt: skip
        reply = self.post("/completion", body | options)
        assert reply.status_code == 200, reply.text
        said = reply.json()
        logprobs = [float(p["logprob"]) for p in said["completion_probabilities"]]
        return Answer([int(t) for t in said["tokens"]], logprobs, said["content"], said)

    def rss_mib(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def wait_ready(self, seconds: float = 120) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            assert self.process.poll() is None, f"llama-server ended: {self.log[-3000:]}"
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"llama-server is not ready: {self.log[-3000:]}")

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def started(build: Build, model: Path, options: Sequence[str], log: Path) -> Iterator[LlamaServer]:
    """Run one until the block ends; it must end in good order."""
    port = free_port()
    argv = [str(build.tool("llama-server")), "-m", str(model), "--port", str(port), "-fa", "on", *options]
    env, _ = child_environment()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=env,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    server = LlamaServer(argv, f"http://127.0.0.1:{port}", process, log)
    try:
        server.wait_ready()
        yield server
    except BaseException:
        process.kill()
        process.wait()
        raise
    code = server.stop()
    assert code == 0, f"llama-server ended with {code}: {server.log[-3000:]}"
