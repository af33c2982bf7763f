"""The whole way on the real llama-perplexity, with real faults put in its way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.harness import QUICK, Cli, faulty, one_sentence
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.records.record import read_record

SEVEN = "f16:f16,q8_0:q8_0,q5_1:q5_1,q5_0:q5_0,q4_1:q4_1,q4_0:q4_0,iq4_nl:iq4_nl"
COLUMNS = {
    *("k", "v", "ppl", "ppl_err", "delta_pct", "kv_mib", "bpv_k", "bpv_v", "status"),
    *("effective_k", "effective_v", "model_sha256", "corpus_sha256", "tree"),
}


@pytest.fixture
def cli(tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile) -> Cli:
    return Cli(tmp_path / "results", build.bin_dir)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, build: Build, smollm: ModelFile, prose: CorpusFile
) -> Iterator[tuple[Cli, str]]:
    """A finished sweep of seven pairs and its JSON; not to be written to."""
    cli = Cli(tmp_path_factory.mktemp("undisturbed") / "results", build.bin_dir)
    done = cli.sweep("--pairs", SEVEN, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    yield cli, done.stdout


def test_json_holds_what_scripts_read(
    undisturbed: tuple[Cli, str], smollm: ModelFile, prose: CorpusFile, build: Build
) -> None:
    rows = json.loads(undisturbed[1])
    assert [f"{r['k']}:{r['v']}" for r in rows] == SEVEN.split(",")
    for row in rows:
        assert set(row) >= COLUMNS
        assert row["status"] == "ok"
        assert (row["effective_k"], row["effective_v"]) == (row["k"], row["v"])
        assert 1 < row["ppl"] < 1000 and row["ppl_err"] > 0
        assert row["model_sha256"] == smollm.sha256
        assert row["corpus_sha256"] == prose.sha256
        assert row["tree"] == build.tree
    assert rows[0]["delta_pct"] == 0
    q8 = rows[1]
    assert q8["delta_pct"] == pytest.approx(100 * (q8["ppl"] / rows[0]["ppl"] - 1))
    # llama.cpp pads this context to 256 positions: 30 layers × 3 KV heads × 64 values, K and V
    assert q8["kv_mib"] == pytest.approx(256 * 30 * 3 * 64 * 2 * 8.5 / 8 / 2**20, abs=0.01)
    assert (q8["bpv_k"], q8["bpv_v"]) == (8.5, 8.5)


def test_numbers_are_those_of_the_command_in_the_record(undisturbed: tuple[Cli, str], tmp_path: Path) -> None:
    cli, _ = undisturbed
    path = next(p for p in cli.results.rglob("*.json") if ".ppl.q4_0-q4_0." in p.name)
    record = read_record(path)
    done = subprocess.run(record.run.argv, capture_output=True, text=True, cwd=tmp_path)
    final = re.search(r"^q4_0:q4_0\S+ +([\d.]+) +[\d.]+ ", done.stdout, re.M)
    assert final is not None and record.ppl == pytest.approx(float(final[1]), abs=6e-5)
    assert record.run.peak_mib > 50
    assert record.provenance.compiler and record.provenance.machine.cpu


def test_resume_repeats_nothing(undisturbed: tuple[Cli, str]) -> None:
    cli, before = undisturbed
    done = cli.sweep("--pairs", SEVEN, *QUICK, "--json")
    assert done.returncode == 0
    assert done.stdout == before
    assert done.stderr.count("(on record)") == 7


def test_table_in_every_format(undisturbed: tuple[Cli, str]) -> None:
    cli, _ = undisturbed
    rich = cli.run("table", cli.results)
    assert rich.returncode == 0 and "4.5/4.5" in rich.stdout
    markdown = cli.run("table", cli.results, "--format", "markdown").stdout
    assert markdown.splitlines()[2].startswith("| K | V | window | bpv |")
    assert cli.run("table", cli.results, "--format", "csv").stdout.count("\n") == 8
    assert len(json.loads(cli.run("table", cli.results, "--format", "json").stdout)) == 7


def test_crash_in_cell_three_does_not_stop_the_rest(cli: Cli, tmp_path: Path, build: Build) -> None:
    rule = 'case "$*" in *"-ctk q5_1"*) kill -SEGV $$;; esac'
    done = cli.sweep("--pairs", SEVEN, *QUICK, bin_dir=faulty(tmp_path / "bin", build.bin_dir, rule))
    assert done.returncode == 3
    status = {r["cell"]["k"]: (r["status"], r["ppl"]) for r in cli.records()}
    assert status.pop("q5_1") == ("crash", None)
    assert len(status) == 6 and all(s == "ok" for s, _ in status.values())
    assert "SIGSEGV" in done.stderr and "crash" in done.stdout


def test_figures_lost_as_the_tool_exits_are_asked_for_again(cli: Cli, tmp_path: Path, build: Build) -> None:
    begun = tmp_path / "begun"
    cut = f'if [ ! -e {begun} ]; then touch {begun}; "$REAL" "$@" 2>&1 | grep -v Final; exit 0; fi'
    bad = faulty(tmp_path / "bin", build.bin_dir, f'case "$*" in *"-ctk f16"*) {cut};; esac')
    done = cli.sweep("--pairs", "f16:f16", *QUICK, bin_dir=bad)
    assert begun.exists()
    assert done.returncode == 0, done.stderr
    assert [r["status"] for r in cli.records()] == ["ok"]


def test_faults_have_their_own_status(cli: Cli, tmp_path: Path, build: Build) -> None:
    """One sweep, one fault a cell: swapped type, hang, NaN printed, silent end, kill -9."""
    rule = """
case "$*" in
  *"-ctk q8_0"*) exec "$REAL" "${@/#q8_0/f16}";;
  *"-ctk q5_1"*) exec sleep 1000;;
  *"-ctk q5_0"*) "$REAL" "$@" 2>&1 | sed -E 's/\\[1\\][0-9.]+/[1]nan/; s/PPL = [0-9.]+/PPL = nan/'; exit 0;;
  *"-ctk q4_1"*) "$REAL" "$@" 2>&1 | grep -v -e Final -e '\\[1\\]'; exit 0;;
  *"-ctk q4_0"*) kill -KILL $$;;
esac"""
    bad = faulty(tmp_path / "bin", build.bin_dir, rule)
    pairs = ",".join(SEVEN.split(",")[:6])
    done = cli.sweep("--pairs", pairs, *QUICK, "--timeout", "20", bin_dir=bad)
    assert done.returncode == 3
    found = {r["cell"]["k"]: r for r in cli.records()}
    assert {k: r["status"] for k, r in found.items()} == {
        "f16": "ok",
        "q8_0": "type-mismatch",
        "q5_1": "timeout",
        "q5_0": "nan",
        "q4_1": "no-result",
        "q4_0": "crash",
    }
    assert found["q8_0"]["detail"] == "K was to be q8_0 but runs as f16"
    assert "SIGKILL" in found["q4_0"]["detail"]
    for k, record in found.items():
        assert (record["ppl"] is None) == (k != "f16"), "a failed cell holds a number"
    table = cli.run("table", cli.results, "--format", "markdown").stdout
    assert all(word in table for word in ("type-mismatch", "timeout", "| nan |", "no-result", "crash"))


def test_nan_weights_give_status_nan(cli: Cli, tmp_path: Path, smollm: ModelFile) -> None:
    """A real model with a real NaN: the weights of the last norm."""
    from gguf import GGUFReader

    broken = tmp_path / "nan.gguf"
    shutil.copy(smollm.path, broken)
    norm = next(t for t in GGUFReader(str(broken)).tensors if t.name == "output_norm.weight")
    with broken.open("r+b") as file:
        file.seek(int(norm.data_offset))
        file.write(struct.pack("<f", float("nan")) * int(norm.n_elements))
    done = cli.sweep("--model", broken, "--pairs", "f16:f16", *QUICK)
    assert done.returncode == 3
    assert [r["status"] for r in cli.records()] == ["nan"]


def _start(cli: Cli, *args: str | Path, bin_dir: Path | None = None) -> subprocess.Popen[str]:
    command = cli.command(*cli.sweep_args(*args, bin_dir=bin_dir))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli.env(),
        # a CI job started in the background hands down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for_child(process: subprocess.Popen[str], needle: str) -> psutil.Process:
    """The llama-perplexity whose arguments contain `needle`, once it runs.

    A process that was forked and has not become its program yet has the arguments of its parent: it is not
    what is waited for.
    """
    own = psutil.Process(process.pid)
    for _ in range(1200):
        assert process.poll() is None, process.stderr and process.stderr.read()
        for child in own.children(recursive=True):
            try:
                arguments = child.cmdline()
                if arguments != own.cmdline() and needle in " ".join(arguments):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"no process with {needle!r} was seen")


def test_kill_9_loses_only_the_running_cell(
    cli: Cli, tmp_path: Path, build: Build, undisturbed: tuple[Cli, str]
) -> None:
    # The third cell never ends by itself, so that the kill certainly falls into it.
    hang = tmp_path / "hang"
    hang.touch()
    rule = f'case "$*" in *"-ctk q5_1"*) [ -e {hang} ] && exec sleep 1000;; esac'
    slow = faulty(tmp_path / "bin", build.bin_dir, rule)
    args = ("--pairs", SEVEN, *QUICK)
    process = _start(cli, *args, bin_dir=slow)
    child = _wait_for_child(process, "sleep 1000")
    process.kill()
    process.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running(), "the orphan goes on computing"
    assert len(cli.records()) == 2
    assert not list(cli.results.rglob("*.tmp"))

    hang.unlink()
    before = {p: p.stat().st_mtime_ns for p in cli.results.rglob("*.json")}
    done = cli.sweep(*args, "--json", bin_dir=slow)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(on record)") == 2
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    for row, whole in zip(json.loads(done.stdout), json.loads(undisturbed[1]), strict=True):
        assert row["k"] == whole["k"]  # the faulty build has no llama-kv-eval: the same to printed digits
        assert (row["ppl"], row["ppl_err"]) == pytest.approx((whole["ppl"], whole["ppl_err"]), abs=1e-4)
        assert row["delta_pct"] == pytest.approx(whole["delta_pct"], abs=1e-3)


def test_killed_llama_perplexity_is_a_crash(cli: Cli, build: Build) -> None:
    process = _start(cli, "--pairs", "f16:f16", "--chunks", "40", "--ctx", "64")
    _wait_for_child(process, "--chunks").send_signal(signal.SIGKILL)
    assert process.wait() == 3
    assert [r["status"] for r in cli.records()] == ["crash"]


def test_ctrl_c_says_how_to_go_on(cli: Cli) -> None:
    process = _start(cli, "--pairs", "f16:f16", "--chunks", "200", "--ctx", "64")
    child = _wait_for_child(process, "--chunks")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_sentence(err) and "run the same command again" in err
    assert cli.records() == []
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


def test_two_sweeps_at_once_share_the_work(cli: Cli) -> None:
    args = ("--pairs", "f16:f16,q8_0:q8_0,q4_0:q4_0", *QUICK, "--json")
    both = [_start(cli, *args) for _ in range(2)]
    outs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert json.loads(outs[0][0]) == json.loads(outs[1][0])
    assert len(cli.records()) == 3
    reused = sum(err.count("(on record)") for _, err in outs)
    assert reused == 3, "each of the six requests but three is answered from the other's records"


def test_full_disk(cli: Cli, build: Build) -> None:
    """/dev/full answers every write as a full disk does."""
    from turbo_eval.llama.provenance import machine

    logs = cli.results / machine().id / "logs"
    logs.mkdir(parents=True)
    done = cli.sweep("--pairs", "f16:f16", *QUICK)
    assert done.returncode == 0
    log = next(logs.glob("*.log"))
    log.unlink()
    log.symlink_to("/dev/full")
    done = cli.sweep("--pairs", "f16:f16", *QUICK, "--fresh")
    assert done.returncode == 4
    assert one_sentence(done.stderr) and "no space left" in done.stderr
    assert len(cli.records()) == 1 and cli.records()[0]["status"] == "ok"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--pairs", "f16:tubro3"), 2, ("'tubro3'", "turbo3")),
        (("--pairs", "f16:f16", "--model", "/nowhere/x.gguf"), 2, ("/nowhere/x.gguf",)),
        (("--pairs", "f16:f16", "--corpus", "/nowhere/x.txt"), 2, ("/nowhere/x.txt",)),
        (("--pairs", "f16:f16", "--backend", "opencl"), 2, ("backend",)),
        (("--pairs", "f16:f16", "--ctx", "many"), 2, ("'many'",)),
        (("--pairs", "f16:f16", "--against", "q8_0:q9_0"), 2, ("'q9_0'", "q8_0")),
        (("--pairs", "f16:f16", "--against", "q8_0:q8_0", "--no-reference"), 2, ("reference",)),
        ((), 2, ("nothing to sweep",)),
    ],
)
def test_bad_input_gets_one_sentence(
    cli: Cli, args: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    done = cli.sweep(*args)
    assert done.returncode == code, done.stderr
    assert one_sentence(done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stdout == "" and not list(cli.results.rglob("*.json"))


def test_bad_files_get_one_sentence(cli: Cli, tmp_path: Path, smollm: ModelFile) -> None:
    short, empty, toml = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "c.toml"
    cut = tmp_path / "cut.gguf"
    short.write_text("Too short a text for the context.\n")
    empty.write_text("")
    toml.write_text('pairs = ["f16:f16"]\nchunk = 3\n')
    with smollm.path.open("rb") as whole:
        cut.write_bytes(whole.read(3_000_000))
    for args, words in (
        (("--pairs", "f16:f16", "--corpus", short), ("short", "too few")),
        (("--pairs", "f16:f16", "--corpus", empty), ("empty",)),
        ((toml,), ("'chunk'", "'chunks'")),
        (("--pairs", "f16:f16", "--model", cut), ("cut.gguf", "truncated")),
    ):
        done = cli.sweep(*args)
        assert done.returncode == 2, done.stderr
        assert one_sentence(done.stderr), done.stderr
        assert all(word in done.stderr for word in words), done.stderr


def test_corpus_too_short_only_in_tokens(cli: Cli, tmp_path: Path) -> None:
    """Enough bytes, too few tokens: known only once llama-perplexity has tokenized it."""
    text = tmp_path / "few.txt"
    text.write_text("internationalization " * 10)
    done = cli.sweep("--pairs", "f16:f16", "--corpus", text, "--ctx", "64", "--chunks", "1")
    assert done.returncode == 3
    assert [r["status"] for r in cli.records()] == ["short-corpus"]


def test_environment_does_not_reach_behind_the_request(cli: Cli) -> None:
    """LLAMA_ARG_* is taken out and noted; GGML_* and LLAMA_* make another cell."""
    args = ("--pairs", "q4_0:q4_0", "--no-reference", *QUICK)
    assert (
        cli.sweep(*args, env={"LLAMA_ARG_CACHE_TYPE_V": "q8_0", "LLAMA_ARG_CTX_SIZE": "32"}).returncode == 0
    )
    (record,) = cli.records()
    assert record["effective"]["v"] == "q4_0"
    assert set(record["run"]["env_removed"]) == {"LLAMA_ARG_CACHE_TYPE_V", "LLAMA_ARG_CTX_SIZE"}
    assert cli.sweep(*args, env={"LLAMA_ATTN_ROT_DISABLE": "1"}).returncode == 0
    rotated = {r["cell"]["env"].get("LLAMA_ATTN_ROT_DISABLE"): r["effective"]["rot_k"] for r in cli.records()}
    assert rotated == {None: True, "1": False}


def test_unreadable_record_is_named_and_run_again(cli: Cli) -> None:
    args = ("--pairs", "f16:f16", *QUICK)
    assert cli.sweep(*args).returncode == 0
    path = next(cli.results.rglob("*.json"))
    path.write_text(path.read_text()[:100])
    table = cli.run("table", cli.results)
    assert table.returncode == 3 and "Traceback" not in table.stderr and path.name in table.stderr
    assert cli.sweep(*args).returncode == 0
    assert cli.run("table", cli.results).returncode == 0
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"schema_version": 99}))
    newer = cli.run("table", cli.results)
    assert newer.returncode == 3 and "schema 99" in newer.stderr
