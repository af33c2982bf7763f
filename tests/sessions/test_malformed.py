"""Files that are no good: refused, and the server or tool goes on or ends in order."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.sessions.conftest import make_place
from tests.sessions.fuzz import TYPES, Reader, fuzz
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build

pytestmark = pytest.mark.build
TEXT = "The ship left the harbour before dawn, and nobody on the quay could say where it would be by night."


def broken(good: bytes) -> dict[str, bytes]:
    """Forty files: cut short at twenty places, and a number of the head at its limit."""
    cuts = [0, 1, 3, 4, 7, 8, 11, 12, 16, 20, 40, 64, 100, *(len(good) * i // 8 for i in range(1, 8))]
    files = {f"cut at {at}": good[:at] for at in cuts}
    for at in (0, 4, 8):  # magic, version, count of tokens
        for value in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"GGUF"):
            files[f"{value!r} at {at}"] = good[:at] + value + good[at + 4 :]
    files["text"] = b"no state at all\n" * 200
    files["zeros"] = bytes(len(good))
    files["backwards"] = good[::-1]
    files["a piece missing"] = good[:200] + good[264:]
    files["shifted"] = good[1:]
    return files


@pytest.mark.parametrize("kind", ["f16", "turbo3", "window"])
def test_malformed_slots_are_refused(build: Build, smollm: ModelFile, folder: Path, kind: str) -> None:
    place = make_place("SmolLM2", kind, build, smollm, folder)
    with place.own("-c", "1024", "-np", "2") as server:
        expected = server.complete(TEXT, 8, id_slot=0, cache_prompt=True)
        assert server.post("/slots/0?action=save", {"filename": "good.bin"}).status_code == 200
        files = broken((place.folder / "good.bin").read_bytes())
        assert len(files) == 40
        for name, content in files.items():
            (place.folder / "bad.bin").write_bytes(content)
            reply = server.post("/slots/1?action=restore", {"filename": "bad.bin"})
            assert reply.status_code == 400, (name, reply.text)
            assert reply.json()["error"]["message"], name
        again = server.complete(TEXT, 8, id_slot=1)
        assert again.tokens == expected.tokens
        good = server.post("/slots/1?action=restore", {"filename": "good.bin"})
        assert good.status_code == 200, good.text


def test_counts_of_almost_4_gib_are_refused_at_once(build: Build, tmp_path: Path) -> None:
    """Neither allocated nor read on for: 2 GiB of memory and a moment are enough to say no."""
    reader = Reader(build, tmp_path)
    good = reader.state(0)
    at = 12 + 4 * struct.unpack_from("<I", good, 8)[0]  # magic, version, count of tokens, tokens
    assert good[at : at + 9] == struct.pack("<I", 5) + b"qwen2"
    reader_options = [*TYPES[0], "--prompt-cache-ro", "--prompt-cache"]

    def tried(data: bytes) -> tuple[int, str]:
        path = tmp_path / "tried"
        path.write_bytes(data)
        done = reader.completed([*reader_options, str(path)], memory=2 << 30)
        return done.returncode, done.stderr + done.stdout

    assert tried(good)[0] == 0
    code, said = tried(good[:at] + struct.pack("<I", 0xF0000000) + good[at + 4 :])
    assert code == 1 and "a string of 4026531840 bytes in the state" in said

    # streams, cells, position of the first cell, and how many sequences it is part of
    streams, cells, position, sequences = struct.unpack_from("<4I", good, at + 9)
    assert (streams, position, sequences) == (1, 0, 1) and cells > 16
    code, said = tried(good[: at + 21] + struct.pack("<I", 0xF0000000))
    assert code == 1 and "the file is cut off" in said


def test_mutated_states_and_profiles(build: Build, tmp_path: Path) -> None:
    """A short run of tests/sessions/fuzz.py."""
    reader = Reader(build, tmp_path)
    fuzz(reader, 7, seconds=300, most=40)
    assert not reader.crashes, reader.counts
    assert reader.counts["refused"] > 10, reader.counts
