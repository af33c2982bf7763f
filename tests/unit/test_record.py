"""Identity, schema and storage of records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.test_bench import bench_record
from tests.support.records import make_cell, make_record
from turbo_eval.errors import IncompleteError
from turbo_eval.formats.window import OFF
from turbo_eval.records import speed
from turbo_eval.records.cell import Cell, CellProfile
from turbo_eval.records.record import read_record
from turbo_eval.records.reference import exact_cell
from turbo_eval.records.store import Store

# What may move a number, and another value for it.
COUNTS: dict[str, object] = {
    "metric": "kld",
    "model_sha256": "3" * 64,
    "corpus_sha256": "3" * 64,
    "k": "q8_0",
    "v": "q8_0",
    "ctx": 1024,
    "chunks": 5,
    "batch": 1024,
    "ubatch": 1,
    "flash_attn": False,
    "anchor": "auto",
    "anchor_sha256": "3" * 64,
    "recent": 128,
    "first": 4,
    "profile": CellProfile(sha256="3" * 64, types_k="turbo4", types_v="turbo2", bits_k=4.25, bits_v=2.25),
    "backend": "cuda",
    "tree": "b" * 40,
    "env": {"GGML_X": "1"},
    "options": {"tokens": 3},
}
NAMES = {"model": "other", "corpus": "other"}


def test_the_key_hashes_all_that_counts_and_nothing_else() -> None:
    key = make_cell().key()
    assert set(COUNTS) | set(NAMES) | {"engine"} == set(Cell.model_fields)
    for name, value in COUNTS.items():
        assert make_cell().model_copy(update={name: value}).key() != key, name
    for name, value in NAMES.items():
        assert make_cell().model_copy(update={name: value}).key() == key, name


@pytest.mark.parametrize(("metric", "moves"), [("ppl", False), ("kld", True), ("decode", True)])
def test_the_engine_counts_where_it_moves_the_number(metric: str, moves: bool) -> None:
    old = make_cell(metric=metric)
    new = old.model_copy(update={"engine": "kv-eval"})
    assert (old.key() != new.key()) == moves
    assert old.comparison_key() == new.comparison_key() and old.reference_key() == new.reference_key()
    before = old.model_dump(mode="json", exclude={"engine"})  # a record from before there were two
    assert Cell.model_validate(before).key() == old.key()


def test_the_key_is_frozen() -> None:
    """A change here orphans every record there is: migrate them or think again."""
    assert make_cell().key() == "2577e2aee4a084d4"


def test_an_old_record_has_no_window_and_keeps_its_key() -> None:
    old = make_cell().model_dump(mode="json", exclude={"recent", "first"})
    assert Cell.model_validate(old).window == OFF
    assert Cell.model_validate(old).key() == make_cell().key()


def test_a_window_is_another_row_of_the_same_table() -> None:
    plain, windowed = make_cell("turbo3:turbo3"), make_cell("turbo3:turbo3", recent=128, first=4)
    assert plain.key() != windowed.key()
    assert plain.text_key() == windowed.text_key()
    assert exact_cell(windowed) == exact_cell(plain)


def test_an_anchor_file_counts_by_content() -> None:
    here = make_cell(anchor="a/x.gguf", anchor_sha256="5" * 64)
    there = make_cell(anchor="b/y.gguf", anchor_sha256="5" * 64)
    assert here.key() == there.key()


def test_round_trip(tmp_path: Path) -> None:
    store, record = Store(tmp_path, "test-2c"), make_record("q8_0:turbo3", 10.5)
    path = store.write(record)
    assert read_record(path) == record
    assert store.load(record.cell) == record
    assert [p.name for p in store.dir.iterdir()] == [path.name]


def test_the_same_cell_under_another_name_replaces_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path, "test-2c")
    store.write(make_record(model="one"))
    store.write(make_record(model="dir/two.gguf"))
    assert [r.cell.model for r in store.all()] == ["dir/two.gguf"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("[]", "no turbo-eval record"),
        ('{"schema_version": 2}', "schema 2"),
        ('{"schema_version": 1}', "damaged at key"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(IncompleteError, match=words):
        read_record(path)


def test_a_record_whose_cell_was_edited_is_refused(tmp_path: Path) -> None:
    path = Store(tmp_path, "test-2c").write(make_record())
    data = json.loads(path.read_text())
    data["cell"]["k"] = "q8_0"
    path.write_text(json.dumps(data))
    with pytest.raises(IncompleteError, match="does not hold the cell"):
        read_record(path)


def test_a_lock_is_free_again_after_use(tmp_path: Path) -> None:
    store, cell = Store(tmp_path, "test-2c"), make_cell()
    with store.lock(cell, wait=False) as first, store.lock(cell, wait=False) as second:
        assert (first, second) == (True, False)
    with store.lock(cell, wait=False) as again:
        assert again


def test_a_speed_record_of_another_schema_is_migrated_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "machine" / "bench"
    record = bench_record()
    path = speed.write_speed(folder, record)
    assert speed.read_bench(tmp_path) == [record]
    old = json.loads(path.read_text()) | {"schema_version": 0, "tokens": 3}
    path.write_text(json.dumps(old))
    assert speed.read_bench(tmp_path) == [] and "schema" in capsys.readouterr().err

    def later(data: dict[str, object]) -> dict[str, object]:
        return {k: v for k, v in data.items() if k != "tokens"} | {"schema_version": speed.BENCH_SCHEMA}

    monkeypatch.setitem(speed.MIGRATIONS, 0, later)
    assert speed.read_bench(tmp_path) == [record]
