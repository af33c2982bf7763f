"""What a number is compared with: one reference in every command, named in every output."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden import World, world
from tests.support.inside import call
from tests.support.records import make_record
from turbo_eval.llama.provenance import machine
from turbo_eval.records.record import Effective
from turbo_eval.records.store import Store

CHUNKS = {
    "f16:f16": (9.0, 10.0, 9.5, 10.0),
    "q8_0:q8_0": (9.1, 10.1, 9.6, 10.1),
    "q8_0:turbo3": (9.2, 10.3, 9.7, 10.25),
}


@pytest.fixture
def place() -> Iterator[World]:
    with world() as made:
        yield made


def with_chunks(pair: str, running: tuple[float, ...], **cell: Any) -> Any:
    record = make_record(pair, running[-1], **cell)
    return record.model_copy(update={"running_ppl": running})


def fill(place: World, root: Path, pairs: tuple[str, ...], **cell: Any) -> Path:
    store = Store(root, machine().id)
    for pair in pairs:
        store.write(with_chunks(pair, CHUNKS[pair], **{**place.shared(), **cell}))
    return root


def what(place: World, pairs: str) -> list[str | Path]:
    return [
        *("--model", str(place.model), "--corpus", str(place.corpus), "--pairs", pairs),
        *("--chunks", "4", "--threads", "2", "--bin-dir", str(place.bin)),
    ]


def config(place: World, text: str) -> Path:
    path = place.folder / "c.toml"
    head = f'model = "{place.model}"\ncorpus = "{place.corpus}"\nchunks = 4\nthreads = 2\n'
    path.write_text(text.replace("HEAD", head))
    return path


THREE = ("f16:f16", "q8_0:q8_0", "q8_0:turbo3")
DELTA = 100 * (10.25 / 10.0 - 1)


def test_three_records_give_one_difference_everywhere(place: World) -> None:
    """sweep, table, gate, report, recommend and compare, to the last digit where they print all digits."""
    root = fill(place, place.folder / "three", THREE)
    tools = ("--bin-dir", place.bin, "--results", root)
    found: dict[str, float] = {}
    code, out, err = call("sweep", *what(place, ",".join(THREE)), "--json", "--results", root)
    assert code == 0, err
    found["sweep"] = next(r["delta_pct"] for r in json.loads(out) if r["v"] == "turbo3")
    _, out, _ = call("table", root, "--format", "json")
    found["table"] = next(r["delta_pct"] for r in json.loads(out) if r["v"] == "turbo3")
    _, out, _ = call("recommend", place.model, "--max-delta-ppl", "50", "--no-measure", "--json", *tools)
    found["recommend"] = next(c["delta_pct"] for c in json.loads(out)["candidates"] if c["v"] == "turbo3")
    sides = (f"{root}@k=f16,v=f16", f"{root}@k=q8_0,v=turbo3")
    _, out, _ = call("compare", *sides, "--format", "json")
    compared = json.loads(out)
    found["compare"] = next(d["delta"] for d in (*compared["differing"], *compared["agreeing"]))
    assert found == dict.fromkeys(found, pytest.approx(DELTA, rel=1e-12)), found
    assert len(set(found.values())) == 1
    gate = config(
        place, f'[sweep]\nHEADpairs = {list(THREE)}\n[[check]]\npair = "q8_0:turbo3"\nmax_delta_pct = 9'
    )
    code, out, err = call("gate", gate, *tools)
    assert code == 0, err
    assert f"ΔPPL {DELTA:+.3f}" in out and "against f16/f16" in out
    _, out, _ = call("report", root, "--markdown")
    assert f"{DELTA:+.2f}" in out and "against f16/f16" in out


def test_a_named_baseline_in_a_file_is_named_in_the_output(place: World) -> None:
    """The same records in sweep and table: the same difference, or another one that says against what."""
    root = fill(place, place.folder / "three", THREE)
    path = config(place, f'HEADpairs = {list(THREE)}\nbaseline = "q8_0:q8_0"\n')
    code, out, err = call("sweep", path, "--bin-dir", place.bin, "--results", root)
    assert code == 0, err
    assert "ΔPPL against q8_0/q8_0" in out
    _, out, _ = call("table", root)
    assert "ΔPPL against f16/f16" in out
    _, named, _ = call("table", root, "--against", "q8_0:q8_0")
    assert "ΔPPL against q8_0/q8_0" in named


def test_the_report_that_started_it_is_compared_with_f16(place: World) -> None:
    from turbo_eval.sweep.spec import load_sweep_data, sweep_spec
    from turbo_eval.util.paths import configs_dir

    spec = sweep_spec(load_sweep_data(configs_dir() / "issue-27.toml"), "issue-27")
    assert spec.against is None and ("f16", "f16") in spec.pairs


def test_without_f16_among_the_pairs_it_is_the_reference_all_the_same(place: World) -> None:
    root = fill(place, place.folder / "three", THREE)
    _code, out, err = call("sweep", *what(place, "q8_0:turbo3,q8_0:q8_0"), "--json", "--results", root)
    rows = {f"{r['k']}:{r['v']}": r for r in json.loads(out)}
    assert rows["q8_0:turbo3"]["delta_pct"] == pytest.approx(DELTA), err
    assert rows["q8_0:turbo3"]["against"] == "f16/f16"


def test_a_sweep_plans_the_reference_it_lacks(place: World) -> None:
    none = place.folder / "none"
    args = what(place, "q8_0:turbo3")
    _, out, _ = call("plan", *args, "--results", none)
    assert re.search(r"1 +tiny +f16/f16 +ppl +512 +4 +off", out), out
    assert "2 of 2 cells" in out
    _, out, _ = call("plan", *args, "--no-reference", "--results", none)
    assert "f16/f16" not in out and "1 of 1 cells" in out
    _, out, _ = call("plan", *args, "--against", "q8_0:q8_0", "--results", none)
    assert "f16/f16" not in out and re.search(r"1 +tiny +q8_0/q8_0", out), out


def test_no_reference_no_difference(place: World) -> None:
    root = fill(place, place.folder / "three", THREE)
    args = [*what(place, ",".join(THREE)), "--no-reference", "--results", root]
    code, out, _ = call("sweep", *args)
    assert code == 0 and "no reference was wanted" in out and "+2.50" not in out
    _, out, _ = call("sweep", *args, "--json")
    assert all(r["delta_pct"] is None for r in json.loads(out))


def test_nothing_stands_in_for_the_reference(place: World) -> None:
    """q8_0 alone on record: no difference is shown, and the gate has no verdict."""
    root = fill(place, place.folder / "two", THREE[1:])
    _, out, _ = call("table", root)
    assert "reference f16/f16 is not on record" in out and "+0.00" not in out
    _, out, _ = call("report", root, "--markdown")
    assert "The reference f16/f16 is not on record: no verdict" in out
    text = '[sweep]\nHEADpairs = ["q8_0:turbo3", "q8_0:q8_0"]\n[[check]]\npair = "q8_0:*"\nmax_delta_pct = 50'
    code, out, err = call("gate", config(place, text), "--bin-dir", place.bin, "--results", root)
    assert code == 3 and "f16/f16" in err and "pass" not in out
    code, out, _ = call(
        *("recommend", place.model, "--max-delta-ppl", "50", "--no-measure", "--json"),
        *("--bin-dir", place.bin, "--results", root),
    )
    assert code == 1 and json.loads(out)["recommended"] is None


def test_f16_with_the_anchor_on_is_no_reference(place: World) -> None:
    root = fill(place, place.folder / "on", THREE[1:])
    shared = {**place.shared(), "anchor": "auto"}
    exact = with_chunks("f16:f16", CHUNKS["f16:f16"], **shared)
    ran = Effective(k="f16", v="f16", anchor="on (anchor: 30/30 layers)")
    Store(root, machine().id).write(exact.model_copy(update={"effective": ran}))
    _, out, _ = call("table", root, "--format", "json")
    assert all(r["delta_pct"] is None for r in json.loads(out) if r["k"] == "q8_0")


@pytest.mark.parametrize(
    "other",
    [
        {"tree": "b" * 40},
        {"chunks": 5},
        {"corpus_sha256": "9" * 64},
        {"model_sha256": "9" * 64},
        {"ctx": 256},
    ],
)
def test_another_text_build_or_model_gives_no_reference(place: World, other: dict[str, Any]) -> None:
    root = fill(place, place.folder / "other", THREE[1:])
    fill(place, root, ("f16:f16",), **other)
    _, out, _ = call("table", root, "--format", "json")
    assert all(r["delta_pct"] is None for r in json.loads(out) if r["k"] == "q8_0")


def test_rows_with_the_anchor_on_are_compared_with_f16_without(place: World) -> None:
    root = fill(place, place.folder / "anchors", THREE[1:], anchor="on")
    fill(place, root, ("f16:f16",), anchor="off")
    _, out, _ = call("table", root, "--format", "json")
    assert next(r for r in json.loads(out) if r["v"] == "turbo3")["delta_pct"] == pytest.approx(DELTA)


@pytest.mark.parametrize("command", ["table", "report"])
def test_what_differs_is_in_the_heading(place: World, command: str) -> None:
    """GGML_FOO=1 makes another comparison; two headings that read alike would be one too few."""
    root = fill(place, place.folder / "env", THREE)
    fill(place, root, THREE, env={"GGML_FOO": "1"})
    args = ("table", root, "--format", "markdown") if command == "table" else ("report", root, "--markdown")
    _, out, _ = call(*args)
    start = "## " if command == "report" else "model tiny"
    headings = [line for line in out.splitlines() if line.startswith(start)]
    assert len(headings) == 2 and len(set(headings)) == 2
    assert sum("GGML_FOO=1" in line for line in headings) == 1


def test_builds_are_told_apart_in_the_report(place: World) -> None:
    root = fill(place, place.folder / "builds", THREE)
    fill(place, root, THREE, tree="b" * 40)
    _, out, _ = call("report", root, "--markdown")
    headings = [line for line in out.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == 2 and any("build bbbbbbbbbbbb" in line for line in headings)


def test_compare_says_which_text_a_line_is_about(place: World) -> None:
    root = fill(place, place.folder / "texts", ("q8_0:q8_0",))
    fill(place, root, ("q8_0:q8_0",), corpus="other.txt", corpus_sha256="9" * 64, chunks=5)
    code, out, err = call("compare", root, root, "--format", "markdown")
    assert code == 0, err
    lines = [line for line in out.splitlines() if "q8_0:q8_0" in line]
    assert len(lines) == 2 and len(set(lines)) == 2
    assert "other.txt" in out and "prose.txt" in out and "chunks" in out
