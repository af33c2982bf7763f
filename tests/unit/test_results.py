"""results, show, recommend, the published schema, and what generation counts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.harness import Cli, one_sentence
from tests.support.records import MACHINE, make_kld, make_record
from tests.unit.test_gate import INFO
from turbo_eval.analysis.recommend import Bound, recommend
from turbo_eval.analysis.summary import summarize
from turbo_eval.metrics.greedy import compare_greedy
from turbo_eval.metrics.needle import compare_needle
from turbo_eval.records.record import Needle, Record, json_schema
from turbo_eval.records.share import problems, scrub
from turbo_eval.records.store import Store, read_all
from turbo_eval.util.paths import repo_root

RECORDS = [
    make_record(ppl=10.0, kld=make_kld(1e-6)),
    make_record("q8_0:q8_0", 10.02, kld=make_kld(0.004)),
    make_record("q8_0:turbo3", 10.2, kld=make_kld(0.012)),
    make_record("turbo4:turbo4", 10.4, kld=make_kld(0.02)),
    make_record("turbo3:turbo3", 12.0, kld=make_kld(0.2)),
    make_record("q4_0:q4_0", status="crash", detail="x", metric="kld"),
]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    store = Store(tmp_path / "results", MACHINE.id)
    for record in RECORDS:
        store.write(record)
    return Cli(tmp_path / "results", tmp_path)


def test_list_and_show(cli: Cli) -> None:
    listed = cli.run("results", "list", "--results", cli.results)
    assert listed.returncode == 0
    assert all(r.key in listed.stdout for r in RECORDS)
    shown = cli.run("show", RECORDS[1].key[:8], "--results", cli.results)
    assert shown.returncode == 0 and "provenance.machine.cpu" in shown.stdout
    missing = cli.run("show", "zzzz", "--results", cli.results)
    assert missing.returncode == 2 and one_sentence(missing.stderr)


def test_prune_says_first_and_does_it_only_when_told(cli: Cli) -> None:
    said = cli.run("results", "prune", "--failed", "--results", cli.results)
    assert said.returncode == 0 and "would delete" in said.stdout and len(cli.records()) == 6
    done = cli.run("results", "prune", "--failed", "--yes", "--results", cli.results)
    assert done.returncode == 0 and len(cli.records()) == 5
    assert cli.run("results", "prune", "--results", cli.results).returncode == 2
    (cli.results / MACHINE.id / "x.json").write_text("{")
    cli.run("results", "prune", "--unreadable", "--keep-tree", "a", "--yes", "--results", cli.results)
    assert len(cli.records()) == 5


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_export(cli: Cli, tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"all{suffix}"
    assert cli.run("results", "export", out, "--results", cli.results).returncode == 0
    if suffix == ".csv":
        frame = pd.read_csv(out)
    elif suffix == ".json":
        frame = pd.read_json(out)
    else:
        frame = pd.read_parquet(out)
    assert len(frame) == 6
    assert set(frame["kld.mean"].dropna()) == {1e-6, 0.004, 0.012, 0.02, 0.2}


def test_the_published_schema_is_the_code_s(cli: Cli) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    published = (repo_root() / "docs" / "reference" / "record.schema.json").read_text()
    assert published == json_schema(), "run `turbo-eval results schema > docs/reference/record.schema.json`"
    validator = jsonschema.Draft202012Validator(json.loads(published))
    for data in cli.records():
        validator.validate(data)
        assert list(validator.iter_errors({**data, "status": "fine"}))
        assert list(validator.iter_errors({**data, "extra": 1}))


def test_recommend_takes_the_smallest_within_the_bound() -> None:
    rows = summarize(RECORDS)
    ranked = recommend(rows, INFO, 8192, Bound(None, 3.0, None))
    good = [f"{c.row.k}/{c.row.v}" for c in ranked if not c.reasons]
    assert good == ["q8_0/turbo3", "q8_0/q8_0", "f16/f16"]
    # 30 layers × 3 heads × 64 values × 8192 positions × (8.5 + 3.25) bits
    assert ranked[0].memory_mib == pytest.approx(30 * 3 * 64 * 8192 * 11.75 / 8 / 2**20)
    why = {f"{c.row.k}/{c.row.v}": c.reasons[0] for c in ranked if c.reasons}
    assert "+4.00 ± 0.10 % is over 3 %" in why["turbo4/turbo4"] and why["q4_0/q4_0"] == "it is crash"


def test_recommend_by_kld_and_memory() -> None:
    rows = summarize(RECORDS)
    by_kld = recommend(rows, INFO, 8192, Bound(0.023, None, None))
    assert f"{by_kld[0].row.k}/{by_kld[0].row.v}" == "turbo4/turbo4"
    on_the_edge = recommend(rows, INFO, 8192, Bound(0.02, None, None))
    assert f"{on_the_edge[0].row.k}/{on_the_edge[0].row.v}" == "q8_0/turbo3"
    assert any(c.within is None and "too close" in c.doubt for c in on_the_edge)
    none = recommend(rows, INFO, 8192, Bound(0.0000001, None, None))
    assert all(c.reasons for c in none)
    small = recommend(rows, INFO, 8192, Bound(None, 3.0, 0.0001))
    assert all(c.reasons for c in small)


def test_without_a_baseline_nothing_is_recommended() -> None:
    rows = summarize([make_record("turbo3:turbo3", 5.0)])
    (only,) = recommend(rows, INFO, 8192, Bound(None, 3.0, None))
    assert "its reference f16/f16 is not on record" in only.reasons[0]


def test_greedy_counts_up_to_the_first_difference() -> None:
    exact = ((1, 2, 3, 4), (5, 6, 7, 8))
    found = compare_greedy(((1, 2, 9, 4), (5, 6, 7, 8)), exact)
    assert (found.agree_pct, found.identical_pct, found.first_divergence) == (75.0, 50.0, 2)
    same = compare_greedy(exact, exact)
    assert (same.agree_pct, same.identical_pct, same.first_divergence) == (100.0, 100.0, None)
    ended = compare_greedy(((1, 2), (5, 6, 7, 8)), exact)
    assert (ended.agree_pct, ended.first_divergence) == (75.0, 2)


def test_a_needle_counts_only_where_f16_finds_it() -> None:
    exact = compare_needle([(512, 0.1, True), (512, 0.5, False), (512, 0.9, True)], None)
    assert (exact.probes, exact.f16_hits, exact.hits) == (3, 2, 2)
    found: Needle = compare_needle([(512, 0.1, False), (512, 0.5, True), (512, 0.9, True)], exact)
    assert (found.probes, found.f16_hits, found.hits) == (3, 2, 1)


# -- submit ----------------------------------------------------------------------------------------


def submitted(folder: Path, *records: Record) -> subprocess.CompletedProcess[str]:
    """`results submit box` of these records."""
    for record in records:
        Store(folder / "results", record.machine).write(record)
    return subprocess.run(
        [
            *(sys.executable, "-m", "turbo_eval", "results", "submit", "box"),
            *("--results", str(folder / "results"), "--out", str(folder / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


def ran(record: Record, **changes: Any) -> Record:
    return record.model_copy(update={"run": record.run.model_copy(update=changes)})


def test_submit_takes_paths_out_and_keeps_what_was_measured(tmp_path: Path) -> None:
    argv = (
        "/home/me/turbo-eval/build/cpu/bin/llama-perplexity",
        "-m",
        "/home/me/models/tiny.gguf",
        "-c",
        "512",
    )
    reference = ran(make_record(), argv=argv)
    failed = make_record("q4_0:q4_0", status="crash", detail="cannot open ~/secret/place/x.gguf: killed")
    done = submitted(tmp_path, reference, make_record("q8_0:q8_0", 10.02), failed)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = {r.cell.pair(): r for r in read_all([tmp_path / "out" / "box"])}
    assert len(kept) == 3
    assert kept["f16:f16"].run.argv == ("llama-perplexity", "-m", "tiny.gguf", "-c", "512")
    assert kept["q4_0:q4_0"].detail == "cannot open x.gguf: killed"
    assert kept["f16:f16"].ppl == reference.ppl and kept["f16:f16"].key == reference.key
    text = "".join(p.read_text() for p in (tmp_path / "out").rglob("*.json"))
    assert "/home" not in text and "secret" not in text
    again = submitted(tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (make_record("q8_0:q8_0", 10.02, corpus="b.txt", corpus_sha256="b" * 64), "its reference f16/f16"),
        (make_record(ppl=0.5), "no perplexity of a text"),
        (make_record(ppl=3e6), "the model does not work"),
        (make_record("q4_0:q4_0", 10.4, kld=make_kld(99.0)), "cannot be"),
        (make_record(ppl=10.0).model_copy(update={"running_ppl": (9.0, 12.0)}), "is not its perplexity"),
        (make_record(model="/home/me/models/tiny.gguf"), "the path /home/me/models/tiny.gguf is in it"),
    ],
)
def test_submit_refuses(tmp_path: Path, record: Record, why: str) -> None:
    done = submitted(tmp_path, record, *([make_record()] if record.cell.k != "f16" else []))
    assert done.returncode == 3 and why in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_submit_refuses_a_name_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "kitchen")
    monkeypatch.setattr("getpass.getuser", lambda: "marie")
    assert problems([make_record()]) == []
    (host,) = problems([ran(make_record(), log="Kitchen/x.log")])
    assert "host name 'kitchen'" in host
    (user,) = problems([ran(make_record(), log="of-marie.log")])
    assert "user name 'marie'" in user


def test_submit_refuses_edited_sources_and_missing_provenance(tmp_path: Path) -> None:
    record = make_record()
    bare = record.provenance.model_copy(update={"dirty": True, "compiler": ""})
    done = submitted(tmp_path, record.model_copy(update={"provenance": bare}))
    assert done.returncode == 3
    assert "edited sources" in done.stdout and "which compiler" in done.stdout


def test_what_is_in_results_reference_could_be_submitted() -> None:
    for folder in filter(Path.is_dir, (repo_root() / "results" / "reference").iterdir()):
        records = read_all([folder])
        assert records and problems(records) == [], folder.name
        assert all(scrub(record) == record for record in records)
