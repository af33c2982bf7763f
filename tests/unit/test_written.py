"""Tables in README and docs are what the records of results/reference/ give."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.support.records import MACHINE, make_chunks, make_kld, make_record
from turbo_eval.analysis.written import END, write, written
from turbo_eval.analysis.written.blocks import BLOCKS
from turbo_eval.commands.report import register
from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.records.store import Store

ROOT = Path(__file__).parents[2]


def report(*args: str) -> int:
    return CliRunner().invoke(app(), list(args)).exit_code


def app() -> typer.Typer:
    made = typer.Typer()
    register(made)
    return made


def reference(tmp_path: Path) -> Path:
    store = Store(tmp_path / "results" / "reference" / "tiny-cpu", MACHINE.id)
    for pair, percent, kld, window in (
        ("f16:f16", 0.0, 0.0, 0),
        ("q8_0:q8_0", 0.1, 0.001, 0),
        ("turbo3:turbo3", 4.0, 0.2, 0),
        ("turbo3:turbo3", 0.2, 0.01, 128),
    ):
        chunks = make_chunks([percent / 100 + 0.0001 * i for i in range(8)])
        first = 4 if window else 0
        own = make_record(pair, by_chunk=chunks, kld=make_kld(kld), chunks=8, recent=window, first=first)
        store.write(own)
    return tmp_path / "results" / "reference"


def doc(tmp_path: Path, name: str, inside: str = "") -> Path:
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"before\n\n<!-- turbo-eval: {name} -->\n{inside}{END}\n\nafter\n")
    return path


def test_the_repository_says_what_its_records_say() -> None:
    found = written(ROOT, ROOT / "results" / "reference")
    assert {name for one in found for name in one.differing} == set()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("measured", "| turbo3 | turbo3 | – |"),
        ("budgets", "| a fifth | turbo3/turbo3 | 0.82 | 0.0100 |"),
        ("window-effect", "| turbo3/turbo3 | 0.2000 | 0.0100 | 20.0 |"),
    ],
)
def test_a_table_is_written_and_then_stands(tmp_path: Path, name: str, says: str) -> None:
    records, path = reference(tmp_path), doc(tmp_path, name)
    assert write(written(tmp_path, records)) == [path]
    text = path.read_text()
    assert says in text and text.startswith("before\n\n<!--") and text.endswith(f"{END}\n\nafter\n")
    assert write(written(tmp_path, records)) == []


def test_verdicts_are_in_the_table(tmp_path: Path) -> None:
    records, path = reference(tmp_path), doc(tmp_path, "measured")
    write(written(tmp_path, records))
    lines = [line for line in path.read_text().splitlines() if line.startswith("| turbo3")]
    assert " worse |" in lines[0] and " equivalent |" in lines[1]


def test_a_number_typed_by_hand_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, path = reference(tmp_path), doc(tmp_path, "budgets")
    write(written(tmp_path, records))
    monkeypatch.setattr("turbo_eval.commands.report.repo_root", lambda: tmp_path)
    assert report("--readme", "--check") == 0
    path.write_text(path.read_text().replace("0.0100", "0.0090"))
    assert report("--readme", "--check") == 1
    assert "0.0090" in path.read_text(), "--check writes nothing"
    assert report("--readme") == 0
    assert "0.0100" in path.read_text()


def test_a_record_that_changed_is_found(tmp_path: Path) -> None:
    records = reference(tmp_path)
    doc(tmp_path, "budgets")
    write(written(tmp_path, records))
    other = make_record("q8_0:q8_0", by_chunk=make_chunks([0.001] * 8), kld=make_kld(0.5), chunks=8)
    Store(records / "tiny-cpu", MACHINE.id).write(other)
    (one,) = written(tmp_path, records)
    assert one.differing == ("budgets",)


def test_blocks_that_cannot_be_written(tmp_path: Path) -> None:
    records = reference(tmp_path)
    doc(tmp_path, "budget")
    with pytest.raises(UsageError, match="'budget' that nothing writes") as error:
        written(tmp_path, records)
    assert "budgets" in error.value.next_step
    path = doc(tmp_path, "budgets")
    path.write_text(path.read_text().replace(END, ""))
    with pytest.raises(UsageError, match="has no end"):
        written(tmp_path, records)
    doc(tmp_path, "budgets")
    with pytest.raises(IncompleteError, match="there are no records"):
        written(tmp_path, tmp_path / "nowhere")
    example = doc(tmp_path, "budgets")
    example.write_text("```\n<!-- turbo-eval: anything -->\n```\n")
    assert written(tmp_path, records) == []


def test_a_compared_figure_has_a_source_that_is_there(tmp_path: Path) -> None:
    """What no record holds stands in compared.toml; without a source it is not shown."""
    reference = ROOT / "results" / "reference"
    facts = tomllib.loads((reference / "compared.toml").read_text())["row"]
    sources = [f[name]["source"] for f in facts for name in ("ppl", "h100", "cpu") if name in f]
    for source in {s for s in sources if s != "the unit"}:
        path, _, anchor = source.partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
        slugs = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
        assert anchor in slugs, (source, slugs)
    copy = tmp_path / "reference"
    shutil.copytree(reference, copy)
    text = (copy / "compared.toml").read_text()
    (copy / "compared.toml").write_text(text.replace(f'source = "{sources[3]}"', 'source = ""', 1))
    assert BLOCKS["compared"](copy).count("–") == BLOCKS["compared"](reference).count("–") + 1
