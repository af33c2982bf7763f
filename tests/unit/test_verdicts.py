"""What a hostile or hasty user met in gate, recommend, report, table and plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import toy as toys
from tests.support.golden import TOOL, World, world
from tests.support.harness import one_sentence
from tests.support.inside import call
from tests.support.records import MACHINE, make_kld, make_record
from turbo_eval.cli import COMMANDS, load
from turbo_eval.llama.provenance import machine
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store
from turbo_eval.util import paths
from turbo_eval.util.git import working_tree_hash


@pytest.fixture
def place() -> Iterator[World]:
    with world() as made:
        yield made


def write(root: Path, *records: Record, who: str = "") -> Path:
    store = Store(root, who or machine().id)
    for record in records:
        store.write(record)
    return root


def gate(place: World, root: Path, bounds: str, pairs: tuple[str, ...] = ()) -> tuple[int, str, str]:
    path = place.gate("g", bounds, *([pairs] if pairs else []))
    return call("gate", path, "--bin-dir", place.bin, "--results", root)


def recommend(place: World, root: Path, *args: str, measure: bool = False) -> tuple[int, str, str]:
    more = [] if measure else ["--no-measure"]
    return call("recommend", place.model, *args, *more, "--bin-dir", place.bin, "--results", root)


# -- recommend --------------------------------------------------------------------------------------


def ppl(pair: str, value: float, err: float = 0.001, **cell: Any) -> Record:
    """A record of a KL run: its paired error is known."""
    kld = make_kld(abs(value / 10 - 1) / 2 + 1e-6).model_copy(update={"ratio_err": err})
    return make_record(pair, value, kld=kld, **cell)


def test_recommend_looks_over_all_settings(place: World) -> None:
    """Five pairs in one setting; the best of all in another, with less text."""
    shared = place.shared()
    five = {
        "f16:f16": 10.0,
        "q8_0:q8_0": 10.02,
        "q4_0:q4_0": 10.5,
        "turbo4:turbo4": 10.4,
        "turbo3:turbo3": 12.0,
    }
    root = write(place.folder / "r", *(ppl(p, x, chunks=8, **shared) for p, x in five.items()))
    write(root, ppl("f16:f16", 20.0, ctx=256, **shared), ppl("q8_0:turbo3", 20.19, ctx=256, **shared))
    code, out, err = recommend(place, root, "--max-delta-ppl", "3%")
    assert code == 0, err
    first = next(line for line in out.splitlines() if line.startswith("recommended"))
    assert "q8_0/turbo3" in first and "+0.95" in first
    assert "4 chunks of 256 tokens" in first and "prose.txt" in first and "against f16/f16" in first
    assert "±" in first
    run = next(line for line in out.splitlines() if line.startswith("run  "))
    assert f"llama-server -m {place.model} -c 8192 -fa on -ctk q8_0 -ctv turbo3" in run
    by_layer = next(line for line in out.splitlines() if line.startswith("by layer"))
    assert f"turbo-eval tune {place.model} --max-delta-ppl 3%" in by_layer


def test_recommend_heeds_the_text_that_was_asked_for(place: World) -> None:
    shared = place.shared()
    root = write(place.folder / "r", ppl("f16:f16", 10.0, **shared), ppl("turbo3:turbo3", 10.1, **shared))
    code, _, err = recommend(place, root, "--max-kld", "1", "--corpus", "/nowhere/x.txt")
    assert code == 2 and one_sentence(err) and "/nowhere/x.txt" in err
    other = place.folder / "other.txt"
    other.write_text("Another text. " * 500)
    code, out, _ = recommend(place, root, "--corpus", str(other), "--json", "--max-delta-ppl", "3")
    assert code == 1 and json.loads(out)["candidates"] == []
    code, out, _ = recommend(place, root, "--chunks", "9", "--json", "--max-delta-ppl", "3")
    assert code == 1 and json.loads(out)["candidates"] == []
    code, out, _ = recommend(place, root, "--text-ctx", "512", "--json", "--max-delta-ppl", "3")
    assert code == 0 and json.loads(out)["recommended"]["k"] == "turbo3"


def test_recommend_heeds_the_window_that_was_asked_for(place: World) -> None:
    tool = place.bin / "llama-perplexity"
    tool.write_text(tool.read_text().replace("--kv-anchor MODE", "--kv-anchor MODE --kv-recent N"))
    shared = place.shared()
    root = write(place.folder / "r", ppl("f16:f16", 10.0, **shared), ppl("turbo3:turbo3", 12.0, **shared))
    write(root, *(ppl("turbo3:turbo3", 10.2 - r / 1000, recent=r, first=4, **shared) for r in (64, 128)))
    bound = ("--max-delta-ppl", "3", "--json")
    for asked, named in (("64", [64]), ("0,128", [128]), ("0", []), ("auto", [128])):
        code, out, err = recommend(place, root, *bound, "--recent", asked)
        assert code == 0, err
        found = json.loads(out)
        assert [c["recent"] for c in found["candidates"] if c["within"] and c["k"] != "f16"] == named, asked
        assert found["recommended"]["recent"] == (named[0] if named else 0)
    code, _, err = recommend(place, root, *bound, "--recent", "many")
    assert code == 2 and one_sentence(err) and "--recent" in err


def test_recommend_says_what_the_text_cannot_decide(place: World) -> None:
    """turbo4/turbo3 within the bound and turbo4/turbo4, which has more bits, outside of it: noise."""
    shared = place.shared()
    root = write(
        place.folder / "r",
        ppl("f16:f16", 10.0, **shared),
        ppl("q8_0:q8_0", 10.01, **shared),
        ppl("turbo4:turbo3", 10.252, 0.02, **shared),
        ppl("turbo4:turbo4", 10.389, 0.02, **shared),
    )
    code, out, err = recommend(place, root, "--max-delta-ppl", "3")
    assert code == 0, err
    assert (
        next(line for line in out.splitlines() if line.startswith("recommended")).split()[1] == "q8_0/q8_0:"
    )
    close = next(line for line in out.splitlines() if "turbo4/turbo3:" in line)
    assert close.startswith("undecided") and "too close" in close and "more chunks" in close
    assert "not monotonic: turbo4/turbo4 has more bits than turbo4/turbo3" in out


@pytest.mark.parametrize("status", ["nan", "crash", "cpu-fallback"])
def test_a_pair_that_fails_elsewhere_is_out(place: World, status: str) -> None:
    shared = place.shared()
    root = write(
        place.folder / "r",
        ppl("f16:f16", 10.0, **shared),
        ppl("turbo4:turbo4", 10.1, **shared),
        make_record("turbo4:turbo4", status=status, detail="x", **{**shared, "ctx": 256}),
    )
    _, out, _ = recommend(place, root, "--max-delta-ppl", "3", "--json")
    assert json.loads(out)["recommended"]["k"] == "f16"


def test_another_environment_s_records_do_not_count(place: World) -> None:
    shared = {**place.shared(), "env": {"LLAMA_ATTN_ROT_DISABLE": "1"}}
    root = write(place.folder / "r", ppl("f16:f16", 10.0, **shared), ppl("turbo3:turbo3", 10.1, **shared))
    assert recommend(place, root, "--max-delta-ppl", "3")[0] == 1


def test_missing_pairs_are_tried_after_an_estimate(place: World) -> None:
    """Only f16 and q8_0 on record: what could be smaller is measured (and refused by this tool)."""
    shared = place.shared()
    root = write(place.folder / "r", ppl("f16:f16", 10.0, **shared), ppl("q8_0:q8_0", 10.01, **shared))
    code, out, err = recommend(
        place, root, "--max-delta-ppl", "3", "--corpus", str(place.corpus), measure=True
    )
    assert "not on record: turbo3/turbo3, turbo4/turbo3" in err and " min " in err, err
    assert code == 0 and "q8_0/q8_0" in out
    assert "not          turbo3/turbo3" in out


# -- staleness --------------------------------------------------------------------------------------


@pytest.fixture
def own(place: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> toys.Toy:
    """A checkout whose CPU build is finished and whose records are of it."""
    toy = toys.make(tmp_path, monkeypatch)
    (toy.root / "configs").symlink_to(paths.shipped() / "configs")
    assert call("patches", "apply")[0] == 0
    folder = toy.root / "build" / "cpu"
    (folder / "bin").mkdir(parents=True)
    tool = folder / "bin" / "llama-perplexity"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    tree = working_tree_hash(toy.worktree)
    made = {
        "backend": "cpu",
        "bin_dir": "bin",
        "tree": tree,
        "pin": toy.pin,
        "dirty": False,
        "compiler": "cc",
    }
    (folder / "turbo-eval-build.json").write_text(
        json.dumps({**made, "flags": [], "stamp": "1", "patched": True})
    )
    shared = {**place.shared(), "tree": tree}
    write(toy.root / "results", *(ppl(p, x, **shared) for p, x in (("f16:f16", 10.0), ("q8_0:q8_0", 10.01))))
    return toy


def _on_own(place: World) -> dict[str, list[str]]:
    what = ["--model", str(place.model), "--corpus", str(place.corpus), "--pairs", "f16:f16,q8_0:q8_0"]
    config = place.gate("own", "max_delta_pct = 3", ("f16:f16", "q8_0:q8_0"))
    Path(config).write_text(Path(config).read_text().replace("[sweep]", '[sweep]\nmetrics = ["kld"]'))
    return {
        "sweep": ["sweep", *what, "--metrics", "kld", "--chunks", "4"],
        "gate": ["gate", config],
        "recommend": ["recommend", str(place.model), "--no-measure"],
        "table": ["table"],
        "report": ["report", "--markdown"],
    }


@pytest.mark.parametrize("command", ["sweep", "gate", "recommend", "table", "report"])
def test_an_edit_of_the_sources_is_said(place: World, own: toys.Toy, command: str) -> None:
    args = _on_own(place)[command]
    code, _, err = call(*args)
    assert code == 0 and "changed since" not in err, err
    (own.worktree / "add.c").write_text("int add(int a, int b) {\n    return b + a;\n}\n")
    code, _out, err = call(*args)
    assert "was changed since the cpu build" in err and "make build-cpu" in err, err
    assert code == (3 if command == "gate" else 0)
    assert command != "gate" or "stale" in err


def test_an_edit_within_the_second_of_the_checkout_is_seen(tmp_path: Path) -> None:
    """Of the same length, so that only the content tells."""
    toys.run("git", "init", "--quiet", cwd=tmp_path)
    (tmp_path / "add.c").write_text("a + b")
    toys.run("git", "add", "--all", cwd=tmp_path)
    before = working_tree_hash(tmp_path)
    (tmp_path / "add.c").write_text("b + a")
    time.sleep(1.1)
    assert working_tree_hash(tmp_path) != before


def test_doctor_says_what_an_edit_is(place: World, own: toys.Toy) -> None:
    """A commit in build/src is no other series or pin."""
    own.patch("add.c", "a + b", "b + a", "add : turn around")
    _, out, _ = call("doctor", "--json")
    said = {f["name"]: f["detail"] for f in json.loads(out)}
    assert said["patches"] == "0 patches: there are edits the series does not hold"
    assert said["cpu"].endswith("and the sources were changed since")


@pytest.mark.parametrize("command", ["gate", "recommend", "table", "report"])
def test_records_of_another_build_are_said(place: World, own: toys.Toy, command: str) -> None:
    old = {**place.shared(), "tree": "b" * 40}
    root = own.root / "results"
    for path in (root / machine().id).glob("*.json"):
        path.unlink()
    write(root, *(ppl(p, x, **old) for p, x in (("f16:f16", 10.0), ("q8_0:q8_0", 10.01))))
    code, _out, err = call(*_on_own(place)[command])
    assert ("stale" in err and "bbbbbbbbbbbb" in err) or (
        command == "recommend" and "stale: 2 records" in err
    ), err
    assert code == {"gate": 3, "recommend": 1}.get(command, 0)


# -- records ----------------------------------------------------------------------------------------


def test_a_failure_does_not_take_a_number_s_place(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE.id)
    good, bad = make_record("q8_0:q8_0", 10.0), make_record("q8_0:q8_0", status="timeout", detail="slow")
    store.write(good)
    store.write(bad)
    assert store.load(good.cell) == good
    (kept,) = (tmp_path / MACHINE.id / "history").iterdir()
    assert json.loads(kept.read_text())["status"] == "timeout"
    assert store.all() == [good]


def test_a_better_record_sends_the_old_one_to_history(tmp_path: Path) -> None:
    store = Store(tmp_path, MACHINE.id)
    old, new = make_record("q8_0:q8_0", 10.0), make_record("q8_0:q8_0", 10.5)
    failed = make_record("q8_0:q8_0", status="crash", detail="x")
    store.write(failed)
    store.write(old)
    assert not (tmp_path / MACHINE.id / "history").exists(), "a failure is nothing to keep"
    store.write(new)
    assert store.load(new.cell) == new
    (kept,) = (tmp_path / MACHINE.id / "history").iterdir()
    assert json.loads(kept.read_text())["ppl"] == 10.0
    store.write(new)
    assert len(list((tmp_path / MACHINE.id / "history").iterdir())) == 1, "nothing changed"


@pytest.mark.parametrize("content", ["{", '{"schema_version": 1}', "\xff", '{"schema_version": 99}', "NaN"])
@pytest.mark.parametrize(
    "command",
    [
        *(("table",), ("table", "--format", "json"), ("report", "--markdown"), ("results", "list")),
        *(("recommend",), ("plan",), ("sweep",), ("gate",), ("compare",), ("show",)),
    ],
)
def test_one_unreadable_file_is_a_warning_with_its_name(
    place: World, command: tuple[str, ...], content: str
) -> None:
    broken = place.whole / machine().id / "tiny.ppl.q5_0-q5_0.0123456789abcdef.json"
    broken.write_text(content, encoding="latin-1")
    name, *more = command
    what = ["--model", str(place.model), "--corpus", str(place.corpus), "--pairs", "f16:f16,q8_0:q8_0"]
    what += ["--chunks", "4", "--bin-dir", str(place.bin), "--results", str(place.whole)]
    args: dict[str, list[str]] = {
        "recommend": ["recommend", str(place.model), "--no-measure", *what[-4:]],
        "plan": ["plan", *what],
        "sweep": ["sweep", *what],
        "gate": ["gate", place.gate("g", "max_ppl = 11"), *what[-4:]],
        "compare": ["compare", str(place.whole), str(place.whole)],
        "show": ["show", place.key("q8_0:turbo3", "ppl"), "--results", str(place.whole)],
        "results": ["results", "list", "--results", str(place.whole)],
    }
    code, _, err = call(*args.get(name, [name, str(place.whole), *more]))
    assert code == 0, err
    if name not in ("sweep", "show"):  # they look at the cells they were asked for alone
        assert broken.name in err and err.count("warning") == 1, err


def test_a_damaged_record_of_the_gate_is_named(place: World) -> None:
    path = next((place.whole / machine().id).glob("*.ppl.q8_0-turbo3.*.json"))
    path.write_text(path.read_text().replace("10.2", "NaN"))
    code, _out, err = gate(place, place.whole, "max_ppl = 11")
    assert code == 3 and path.name in err and "no record" not in err


def test_a_record_copied_from_another_machine_is_no_record(place: World) -> None:
    elsewhere = MACHINE.model_copy(update={"id": "other"})
    record = make_record("q8_0:q8_0", 10.01, **{**place.cell(), "machine": elsewhere})
    root = write(place.folder / "copied", record, who=machine().id)
    write(root, make_record(**place.shared()))
    code, _, err = gate(place, root, "max_delta_pct = 3", ("f16:f16", "q8_0:q8_0"))
    assert code == 3 and "another machine" in err


# -- the report's sentences -------------------------------------------------------------------------


def report_of(tmp_path: Path, *records: Record) -> str:
    write(tmp_path / "r", *records, who=MACHINE.id)
    code, out, err = call("report", tmp_path / "r", "--markdown")
    assert code == 0, err
    return out


def test_nothing_measured_is_not_nothing_within(tmp_path: Path) -> None:
    said = report_of(tmp_path, make_record())
    assert "stays within" not in said and "No quantized pair was measured" in said


def test_a_destroyed_pair_is_on_no_front_and_a_gain_is_no_loss(tmp_path: Path) -> None:
    from turbo_eval.analysis.figures import losses
    from turbo_eval.analysis.picture.points import front
    from turbo_eval.analysis.summary import summarize

    records = [make_record(), make_record("q8_0:q8_0", 9.969), make_record("turbo3:turbo3", 8780.7)]
    rows = summarize(records)
    found = front(rows)
    assert found is not None and found.destroyed == ("turbo3/turbo3",)
    assert [point.name for point in found.best()] == ["q8_0/q8_0"]
    values = {f"{r.k}/{r.v}": value for r, value in losses(rows)[0]}
    assert values["q8_0/q8_0"] == pytest.approx(-0.31), "the figure draws what was measured"
    assert "f16/f16" not in values, "the reference has no loss to draw"


def test_a_named_reference_is_drawn_at_no_invented_loss(tmp_path: Path) -> None:
    from turbo_eval.analysis.figures import losses
    from turbo_eval.analysis.summary import summarize

    rows = summarize([make_record("q8_0:q8_0", 10.0), make_record("q4_0:q4_0", 10.4)], ("q8_0", "q8_0"))
    found, name = losses(rows)
    assert [(r.k, round(value, 6)) for r, value in found] == [("q4_0", 4.0)]
    assert name == "ΔPPL against q8_0/q8_0 [%]"


def test_the_report_s_sentence_carries_the_doubt(tmp_path: Path) -> None:
    said = report_of(tmp_path, ppl("f16:f16", 10.0), ppl("q8_0:turbo3", 10.29, 0.01))
    assert "ΔPPL +2.90 ± 1.00 %, too close to the limit" in said


# -- tracebacks -------------------------------------------------------------------------------------


def test_a_file_in_the_way_of_the_report(place: World) -> None:
    out = place.folder / "file"
    out.touch()
    code, _, err = call("report", place.whole, "--out", out)
    assert code in (2, 4) and one_sentence(err) and str(out) in err


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.parquet"])
def test_export_into_a_folder_that_is_not_there(place: World, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    code, _, err = call("results", "export", place.folder / "nodir" / name, "--results", place.whole)
    assert code == 2 and one_sentence(err) and "nodir" in err


ASCII = (
    "plan",
    "sweep-kld",
    "gate-regression",
    "table-rich",
    "table-markdown",
    "table-failed",
    "results-list",
    "report",
)


@pytest.mark.parametrize("columns", ["40"])
def test_every_command_on_an_ascii_terminal(place: World, columns: str) -> None:
    """Δ, ± and × cannot be written there; what is printed says the same in ASCII."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": columns, "PYTHONUTF8": "0"}
    done: dict[str, subprocess.CompletedProcess[bytes]] = {}
    for name, arguments in place.commands().items():
        if name not in ASCII:
            continue
        command = [sys.executable, "-m", "turbo_eval", *arguments]
        done[name] = subprocess.run(command, env=env, capture_output=True)
        text = (done[name].stdout + done[name].stderr).decode("ascii")
        assert "Traceback" not in text, text
    assert b"dPPL" in done["table-markdown"].stdout and b"+-" in done["table-markdown"].stdout


# -- messages ---------------------------------------------------------------------------------------


def test_a_gate_file_without_checks_is_a_sweep_all_the_same(place: World) -> None:
    path = place.folder / "half.toml"
    path.write_text(
        f'[sweep]\nmodel = "{place.model}"\ncorpus = "{place.corpus}"\nchunks = 4\npairs = ["f16:f16"]\n'
    )
    code, out, err = call("plan", path, "--bin-dir", place.bin, "--results", place.whole)
    assert code == 0 and "f16/f16" in out, err
    code, _, err = call("gate", path, "--bin-dir", place.bin, "--results", place.whole)
    assert code == 2 and "[[check]]" in err
    path.write_text(path.read_text() + "\n[[check]]\npair = 'f16:f16'\nmax_ppl = 11\n")
    path.write_text("pairs = ['q8_0:q8_0']\n" + path.read_text())
    code, _, err = call("plan", path, "--bin-dir", place.bin, "--results", place.whole)
    assert code == 2 and "'pairs'" in err and "below [sweep]" in err


def test_a_gate_without_records_says_it_once(place: World) -> None:
    code, out, err = gate(place, place.folder / "none", "max_ppl = 11\n[[check]]\npair = '*'\nmax_ppl = 99")
    assert code == 3 and out == ""
    assert len(err.strip().splitlines()) == 1 and "turbo-eval sweep" in err


@pytest.mark.parametrize("pattern", ["q8_0:trubo3", "q8:turbo3", "q8_0:trubo*", "a:b:c"])
def test_a_type_that_does_not_exist_is_bad_config(place: World, pattern: str) -> None:
    path = Path(place.gate("g", "max_ppl = 11"))
    path.write_text(path.read_text().replace('"q8_0:*"', f'"{pattern}"'))
    code, _, err = call("gate", path, "--bin-dir", place.bin, "--results", place.whole)
    assert code == 2 and one_sentence(err), err


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_plan_shows_contexts_on_narrow_terminals(place: World, columns: str) -> None:
    command = ["plan", "--model", str(place.model), "--corpus", str(place.corpus), "--ctx", "256,1024"]
    command += ["--pairs", "f16:f16,turbo4:turbo4", "--chunks", "4", "--metrics", "kld,decode"]
    done = subprocess.run(
        [sys.executable, "-m", "turbo_eval", *command, "--bin-dir", str(place.bin)],
        env=os.environ | {"COLUMNS": columns},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    joined = done.stdout.replace("\n", "")
    assert joined.count("1024") >= 4 and max(map(len, done.stdout.splitlines())) <= int(columns)


def test_a_context_beyond_the_model_s_training(place: World) -> None:
    text = place.folder / "long.txt"
    text.write_text("words and words " * 20_000)
    args = ["--model", str(place.model), "--corpus", str(text), "--pairs", "f16:f16", "--ctx", "16384"]
    args += ["--chunks", "2", "--bin-dir", str(place.bin), "--results", str(place.folder / "none")]
    for command in ("plan", "sweep"):
        _, _, err = call(command, *args)
        assert "trained on contexts of up to 8192" in err
    assert "8192" in recommend(place, place.whole, "--ctx", "100000")[2]


def test_more_chunks_than_the_text_can_hold(place: World) -> None:
    args = ["--model", str(place.model), "--corpus", str(place.corpus), "--pairs", "f16:f16"]
    code, _, err = call("plan", *args, "--chunks", "999", "--bin-dir", place.bin, "--results", place.whole)
    assert code == 2 and one_sentence(err) and "at most 12 --chunks" in err


def _pages() -> list[list[str]]:
    """Every command and command of a group."""
    found = []
    for name in COMMANDS:
        inner = getattr(load(name), "commands", {})
        found += [[name, sub] for sub in inner] or [[name]]
    return found


@pytest.mark.parametrize("page", _pages(), ids=" ".join)
def test_every_help_page_has_an_example(page: list[str]) -> None:
    code, out, _ = call(*page, "--help")
    assert code == 0
    assert f"turbo-eval {' '.join(page)}" in out.split("Usage:", 1)[1].split("\n", 1)[1], "no example"


@pytest.mark.parametrize(
    "arguments",
    [["sweep", "--nonsense"], ["nonsense"], ["sweep", "--chunks"], ["gate"], ["table", "--format", "yaml"]],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_command_line_that_is_none_gets_one_sentence(arguments: list[str], columns: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "turbo_eval", *arguments],
        env=os.environ | {"COLUMNS": columns},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--help" in done.stderr
