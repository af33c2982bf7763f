"""What a session does to a KV cache: saved at one context size, restored at another; shifted; refused.

`test-kv-session` of the series runs them on real models: see build/src/tests/test-kv-session.cpp.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.util.process import child_environment

pytestmark = pytest.mark.build

NO_ROTATION = {"LLAMA_ATTN_ROT_DISABLE": "1"}


class Session:
    """Runs the tool on one model and text."""

    def __init__(self, build: Build, model: Path, text: Path) -> None:
        self.head = [str(build.tool("test-kv-session")), str(model), str(text)]

    def run(
        self, command: str, argument: object, *options: str, env: dict[str, str] | None = None
    ) -> list[str]:
        done = subprocess.run(
            [*self.head, command, str(argument), *options],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**child_environment()[0], **(env or {})},
            timeout=600,
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
        return done.stdout.splitlines()

    def logprobs(
        self, command: str, file: Path, *options: str, env: dict[str, str] | None = None
    ) -> list[float]:
        lines = self.run(command, file, *options, env=env)
        assert len(lines) == 16, lines
        return [float(line) for line in lines]

    def refusal(self, file: Path, *options: str, env: dict[str, str] | None = None) -> str:
        [line] = self.run("load", file, *options, env=env)
        assert line.startswith("refused: "), line
        return line

    def nll(self, shifts: int, *options: str, env: dict[str, str] | None = None) -> float:
        [line] = self.run("shift", shifts, *options, env=env)
        return float(line)


@pytest.fixture(scope="module")
def smol(build: Build, smollm: ModelFile, prose: CorpusFile) -> Session:
    return Session(build, smollm.path, prose.path)


@pytest.fixture(scope="module")
def coder(build: Build, qwen: ModelFile, prose: CorpusFile) -> Session:
    return Session(build, qwen.path, prose.path)


# -- saved here, restored there ----------------------------------------------------------------------

SMALL = ("ctx=2048", "seqs=2")
LARGE = ("ctx=8192", "seqs=4")


def same(restored: list[float], saved: list[float]) -> None:
    """A restored window has its copies in another order, so the last bit of a sum can differ.

    Weights of 4 bits round the activations to 8 bits, which makes more of it. Without a window all bits
    agree.
    """
    assert restored[0] == pytest.approx(saved[0], abs=1e-3)
    assert restored == pytest.approx(saved, abs=0.5)


@pytest.mark.parametrize("large", [LARGE, (*LARGE, "unified=1")], ids=["split", "unified"])
def test_another_context_size_and_number_of_slots(
    coder: Session, tmp_path: Path, large: tuple[str, ...]
) -> None:
    """Qwen has a K bias: the constants that take it out must not know the size of the context."""
    pair = ("k=turbo3", "v=turbo3")
    state = tmp_path / "state"
    saved = coder.logprobs("save", state, *pair, *SMALL)
    restored = coder.logprobs("load", state, *pair, *SMALL)
    same(restored, saved)
    assert coder.logprobs("load", state, *pair, *large) == restored


@pytest.mark.parametrize("pair", ["f16:f16", "q8_0:turbo3", "turbo4:turbo4"])
def test_pairs(smol: Session, tmp_path: Path, pair: str) -> None:
    k, v = pair.split(":")
    state = tmp_path / "state"
    saved = smol.logprobs("save", state, f"k={k}", f"v={v}", *SMALL)
    same(smol.logprobs("load", state, f"k={k}", f"v={v}", *LARGE), saved)

    options = (f"k={k}", f"v={v}", "recent=0", "first=0")
    saved = smol.logprobs("save", state, *options, *SMALL)
    assert smol.logprobs("load", state, *options, *LARGE) == saved


def test_refusals_name_what_differs(coder: Session, tmp_path: Path) -> None:
    state = tmp_path / "state"
    coder.logprobs("save", state, "k=q8_0", "v=turbo3")
    how = "or process the prompt again"
    for options, env, differs in (
        (
            ("k=q8_0", "v=turbo4"),
            {},
            "V of type turbo3 in layer 0, this context has turbo4",
        ),
        (("k=turbo3", "v=turbo3"), {}, "K of type q8_0 in layer"),
        (
            ("k=q8_0", "v=turbo3", "anchor=off"),
            {},
            "the K anchor on, this context has it off",
        ),
        (("k=q8_0", "v=turbo3"), NO_ROTATION, "K rotated in groups of 64, this context has it not rotated"),
        (("k=q8_0", "v=turbo3", "ctx=256"), {}, "the state has 300 tokens, this context has room for 256"),
    ):
        said = coder.refusal(state, *options, env=env)
        assert differs in said
        assert how in said or "--ctx-size" in said


def test_files_that_are_no_states(smol: Session, tmp_path: Path) -> None:
    state = tmp_path / "state"
    smol.logprobs("save", state, "k=turbo3", "v=turbo3")
    data = state.read_bytes()
    broken = tmp_path / "broken"
    for damaged, differs in (
        (b"GGUF" + data[4:], "not a file of a saved sequence"),
        (data[:800], "cut off"),
        (data[: len(data) // 2], "cut off"),
        (data[:-1], "cut off"),
        (_patched(data, 0, 99), "the state has version 99, this build knows version 1"),
        (_patched(data, 5, 0xF0000000), "a name is too long"),
    ):
        broken.write_bytes(damaged)
        assert differs in smol.refusal(broken, "k=turbo3", "v=turbo3")


def _info(data: bytes) -> int:
    """Where what a state depends on begins: after magic, version, tokens, streams, cells, flags, layers."""
    tokens: int = struct.unpack_from("<I", data, 8)[0]
    at = 12 + 4 * tokens
    assert struct.unpack_from("<II", data, at) == (1, 300)  # streams, cells
    return at + 8 + 300 * 12 + 8  # position, number of sequences, sequence


def _patched(data: bytes, field: int, value: int) -> bytes:
    at = _info(data) + 4 * field
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


def test_what_llama_cpp_saves_is_read_and_saved(smol: Session, tmp_path: Path) -> None:
    """Upstream's format: nothing is added for f16, and a q8_0 state without the addition still loads."""
    state = tmp_path / "state"
    smol.logprobs("save", state, "k=f16", "v=f16")
    data = state.read_bytes()
    assert struct.unpack_from("<II", data, _info(data) - 8) == (0, 30)

    options = ("k=q8_0", "v=q8_0", "anchor=off")
    saved = smol.logprobs("save", state, *options)
    data = state.read_bytes()
    at = _info(data)
    assert struct.unpack_from("<II", data, at - 8) == (8, 30)
    end = at + 4 + 8 + 4 + 4 + 4 + 4 + 60 * (4 + len("q8_0")) + 4
    state.write_bytes(data[: at - 8] + struct.pack("<II", 0, 30) + data[end:])
    assert smol.logprobs("load", state, *options) == saved
    assert "with the K anchor off, this context has it on" in smol.refusal(state, *options[:2], "anchor=on")
    assert "unset LLAMA_ATTN_ROT_DISABLE" in smol.refusal(state, *options, env=NO_ROTATION)
    state.write_bytes(data[: at - 8] + struct.pack("<II", 2, 30) + data[at + 4 : at + 12] + data[end:])
    assert "saved by an older build" in smol.refusal(state, *options)


# -- context shift -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["turbo3", "turbo4"])
def test_shifts_wear_nothing_out(smol: Session, kind: str) -> None:
    none, often = (smol.nll(n, f"k={kind}", f"v={kind}") for n in (0, 8))
    assert often == pytest.approx(none, rel=0.03)


@pytest.mark.parametrize("kind", ["turbo3", "turbo4"])
def test_nor_without_a_window(smol: Session, kind: str) -> None:
    """Only the kept first token is requantized. Its error is another one each time, for better or worse."""
    options = (f"k={kind}", f"v={kind}", "recent=0", "first=0")
    assert smol.nll(8, *options) < 1.03 * smol.nll(0, *options)


def test_shifts_with_a_bias(coder: Session) -> None:
    none, often = (coder.nll(n, "k=turbo3", "v=turbo3") for n in (0, 8))
    assert often == pytest.approx(none, rel=0.03)


def test_the_check_of_shifts_can_fail(smol: Session) -> None:
    """Few bits are seen: what is repeated is less certain than with f16."""
    assert smol.nll(8, "k=turbo3", "v=turbo3", "recent=0", "first=0") > 1.1 * smol.nll(8, "k=f16", "v=f16")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "turbo3"])
def test_shift_of_keys_that_are_not_rotated(smol: Session, kind: str) -> None:
    assert smol.nll(1, f"k={kind}", f"v={kind}", "anchor=off", env=NO_ROTATION) < 3
