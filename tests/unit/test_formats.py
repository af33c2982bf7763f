"""A cache type is one row that all others read; types of other people stay readable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.records import make_record
from turbo_eval.commands import bench, probe
from turbo_eval.errors import UsageError
from turbo_eval.formats import cache_types
from turbo_eval.formats.cache_types import BOOKS, CACHE_TYPES, CacheType, Codebook
from turbo_eval.formats.codec import decode, gaussian_mse, readable, reference
from turbo_eval.probe.dump import Setup
from turbo_eval.probe.steps import _judge_cache
from turbo_eval.records.record import read_record
from turbo_eval.util import project


@pytest.mark.parametrize("name", [t for t in CACHE_TYPES if t != "f32"])
def test_every_type_is_readable_and_its_error_known(name: str) -> None:
    assert readable(name)
    assert 0 < (gaussian_mse(name) or 0) < 0.11


@pytest.mark.parametrize("book", BOOKS.values(), ids=lambda b: b.name)
def test_no_two_bits_of_a_block_share_a_place(book: object) -> None:
    assert isinstance(book, Codebook)
    width = (2 * len(book.magnitudes) - 1).bit_length()
    places = [book.place(i, bit) for i in range(64) for bit in range(width)]
    assert len(set(places)) == len(places)
    assert max(byte for byte, _ in places) < CACHE_TYPES[book.name].block_bytes


def test_the_probe_judges_a_type_that_only_a_project_lists() -> None:
    """tq2_0 is the example of project.toml; gguf has its blocks, our table has not."""
    assert "tq2_0" not in CACHE_TYPES
    x = np.random.default_rng(1).standard_normal((4, 2, 256)).astype(np.float32)
    import gguf.quants
    from gguf import GGMLQuantizationType

    rows = gguf.quants.quantize(x.reshape(-1, 256), GGMLQuantizationType.TQ2_0).reshape(4, 2, -1)
    notes: list[tuple[int, str, str]] = []
    values, noise, allowed = _judge_cache("K", "tq2_0", x, rows, 2, lambda *found: notes.append(found))
    assert values.shape == x.shape and not notes
    assert noise == pytest.approx(allowed, rel=1e-6)
    assert gaussian_mse("tq2_0") == pytest.approx(noise, rel=0.2)


def test_the_probe_refuses_blocks_that_nobody_here_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CACHE_TYPES, "own9", CacheType("own9", 32, 20))
    with pytest.raises(UsageError, match="cannot read a cache of own9"):
        Setup.parse("k=own9,v=f16")


def test_reference_and_decode_agree() -> None:
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    read = reference("f16", x)
    assert read is not None
    assert np.array_equal(read, decode("f16", x.astype(np.float16).view(np.uint8)))
    assert project.BlockSize(block=32, block_bytes=20).block == 32


def test_a_forks_record_is_read_where_nobody_knows_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size came from the project.toml of the folder that one happened to stand in."""
    monkeypatch.setattr(cache_types, "_LEARNT", {})
    record = make_record("f16:f16", 10.0)
    size = project.BlockSize(block=32, block_bytes=20)
    data = json.loads(record.to_json())
    data["cell"] |= {"k": "own9", "v": "own9"}
    data["provenance"]["types"] = {"own9": size.model_dump()}
    data["key"] = record.cell.model_copy(update={"k": "own9", "v": "own9"}).key()
    (tmp_path / f"tiny.ppl.own9-own9.{data['key']}.json").write_text(json.dumps(data))
    done = subprocess.run(
        [sys.executable, "-m", "turbo_eval", "table", str(tmp_path), "--format", "csv"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "own9,own9,5.0,5.0" in done.stdout
    kept = read_record(next(tmp_path.glob("*.json")))
    assert kept.provenance.types == {"own9": size} and json.loads(kept.to_json()) == data


def test_the_pairs_that_commands_take_by_themselves() -> None:
    assert [f"{k}:{v}" for k, v in cache_types.usual_pairs()] == [
        *("turbo3:turbo3", "turbo4:turbo3", "turbo4:turbo4", "q4_0:q4_0"),
        *("q8_0:turbo3", "q8_0:turbo4", "q8_0:q8_0", "f16:f16"),
    ]
    assert (bench.PAIRS, probe.JUDGED) == ("q8_0:q8_0,turbo4:turbo4,turbo3:turbo3", "k=turbo4,v=turbo4")
