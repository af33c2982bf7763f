"""Files that are no good: refused, and the server or tool goes on or ends in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sessions.conftest import make_place
from tests.sessions.fuzz import Reader, fuzz
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


def test_mutated_states_and_profiles(build: Build, tmp_path: Path) -> None:
    """A short run of tests/sessions/fuzz.py."""
    reader = Reader(build, tmp_path)
    fuzz(reader, 7, seconds=300, most=40)
    assert not reader.crashes, reader.counts
    assert reader.counts["refused"] > 10, reader.counts
