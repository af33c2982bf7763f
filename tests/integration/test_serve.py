"""`turbo-eval serve` with the build's llama-server: answers, says what it runs, ends as the server ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import absent
from tests.support.harness import one_sentence
from tests.support.llama_server import free_port
from tests.support.records import make_kld, make_record
from turbo_eval.errors import TurboEvalError
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import machine
from turbo_eval.records.store import Store

pytestmark = pytest.mark.build


@pytest.fixture
def command(build: Build, tmp_path: Path) -> list[str]:
    try:
        build.tool("llama-server")
    except TurboEvalError as error:
        absent(error)
    where = ["--bin-dir", str(build.bin_dir), "--results", str(tmp_path / "results")]
    return [sys.executable, "-m", "turbo_eval", "serve", "smollm2-135m", *where]


@contextmanager
def running(argv: list[str]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """(process, its three lines on the cache) once it serves; killed at the end if it still runs."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)  # never read: small enough for the pipe
        yield process, [process.stdout.readline() for _ in range(4)]
    finally:
        process.kill()
        process.communicate()


def test_answers_and_ends_with_the_server(command: list[str], build: Build, smollm: ModelFile) -> None:
    port = free_port()
    argv = [*command, "--pair", "turbo3", "--ctx", "2048", "--port", str(port), "--", "-np", "2", "-t", "1"]
    with running(argv) as (process, (line, where, cache, expected)):
        assert line.startswith(f"{build.bin_dir}/llama-server -m {smollm.path} -c 2048 -fa on -ctk turbo3")
        assert f"http://127.0.0.1:{port}/v1" in where
        assert "K turbo3, V turbo3; 3.25 bits per value" in cache and "window 128+4 in q8_0" in cache
        assert "MiB" in cache
        assert "sweep --model smollm2-135m --pairs turbo3:turbo3 --metrics kld" in expected
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        reply = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8
        )
        assert reply.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0  # as llama-server ends on it
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_serves_the_window_that_was_measured(
    command: list[str], build: Build, smollm: ModelFile, tmp_path: Path
) -> None:
    """A record without the window is of another cache than the one that llama.cpp takes by itself."""
    known: dict[str, Any] = {"model_sha256": smollm.sha256, "tree": build.tree, "backend": build.backend}
    known |= {"machine": machine(), "anchor": "auto"}
    store = Store(tmp_path / "results", machine().id)
    store.write(make_record("turbo4:turbo4", kld=make_kld(0.03), **known))
    done = subprocess.run([*command, "--max-kld", "0.05", "--dry-run"], capture_output=True, text=True)
    assert "-ctk turbo4 -ctv turbo4 --kv-recent 0 --kv-first 0" in done.stdout, done.stderr
    store.write(make_record("turbo3:turbo3", kld=make_kld(0.04), recent=128, first=4, **known))
    done = subprocess.run([*command, "--max-kld", "0.05", "--dry-run"], capture_output=True, text=True)
    assert "-ctk turbo3 -ctv turbo3 --port" in done.stdout, done.stderr


def test_a_server_that_does_not_start_says_why(command: list[str], smollm: ModelFile) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = [*command, "--pair", "q8_0", "--ctx", "256", "--port", port, "--", "-np", "1"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and one_sentence(done.stderr)
    assert f"something listens on port {port} of 127.0.0.1" in done.stderr
    # its exit code is the server's
    argv = [*command, "--pair", "q8_0", "--", "--no-such-option"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and one_sentence(done.stderr)
    last = done.stderr.splitlines()[-1]
    assert "llama-server ended before it was ready (exit code 1)" in last
    assert "invalid argument: --no-such-option" in last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_before_it_is_ready(command: list[str], smollm: ModelFile, number: signal.Signals) -> None:
    """It ends, and leaves no server behind."""

    def heed() -> None:  # behind a shell's & it would be ignored
        signal.signal(number, signal.SIG_DFL)

    port = free_port()
    argv = [*command, "--pair", "q8_0", "--ctx", "256", "--port", str(port)]
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the line: the server starts next
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
