"""sweep with llama-kv-eval: one process a comparison, a record a cell, each with its own status."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import absent
from tests.support.harness import Cli, faulty, one_sentence
from tests.support.layouts import LAYOUTS, write_model
from turbo_eval.errors import TurboEvalError
from turbo_eval.evidence.tokens import load
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.llama.build import Build

pytestmark = pytest.mark.build

PAIRS = "f16:f16,q8_0:q8_0,turbo3:turbo3"
CTX = 64


@pytest.fixture(scope="module", autouse=True)
def _tool(build: Build) -> None:
    try:
        build.tool("llama-kv-eval")
    except TurboEvalError as error:
        absent(error)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a K bias, so that the anchor has something to do."""
    return write_model(LAYOUTS["qwen2"], tmp_path_factory.mktemp("model") / "small.gguf")


@pytest.fixture(scope="module")
def text(prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(prose.path.read_bytes()[: 12 * CTX])
    return path


class Sweep:
    """turbo-eval sweep on the small model; `records` by (K, metric)."""

    def __init__(self, folder: Path, bin_dir: Path, model: Path, text: Path) -> None:
        self.cli = Cli(folder, bin_dir)
        self.model, self.text = model, text

    def args(self, *more: str | Path) -> list[str | Path]:
        return ["--model", self.model, "--corpus", self.text, "--ctx", str(CTX), *more]

    def run(
        self, pairs: str, *more: str | Path, chunks: int = 2, bin_dir: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        args = self.args("--pairs", pairs, "--chunks", str(chunks), *more)
        return self.cli.sweep(*args, bin_dir=bin_dir)

    def records(self) -> dict[tuple[str, str], dict[str, Any]]:
        found = [json.loads(p.read_text()) for p in self.cli.results.glob("*/*.json")]
        return {(r["cell"]["k"], r["cell"]["metric"]): r for r in found}

    def statuses(self, metric: str) -> dict[str, str]:
        return {k: r["status"] for (k, m), r in self.records().items() if m == metric}


@pytest.fixture
def sweep(tmp_path: Path, build: Build, model: Path, text: Path) -> Sweep:
    return Sweep(tmp_path / "results", build.bin_dir, model, text)


ALL = ("--metrics", "kld,decode")


def test_records_are_those_of_llama_perplexity(sweep: Sweep, tmp_path: Path) -> None:
    one = sweep.run(PAIRS, *ALL, chunks=4)
    assert one.returncode == 0, one.stderr
    other = Sweep(tmp_path / "other", sweep.cli.bin_dir, sweep.model, sweep.text)
    two = other.run(PAIRS, *ALL, "--engine", "llama-perplexity", chunks=4)  # it wants 100 tokens
    assert two.returncode == 0, two.stderr
    here, there = sweep.records(), other.records()
    assert here.keys() == there.keys() - {("f16", "ppl")}
    for name, record in here.items():
        known = there[name]
        assert record["key"] != known["key"], "the engine moves KL divergences and decoding"
        assert record["ppl"] == pytest.approx(known["ppl"], rel=1e-6)
        assert record["ppl_err"] == pytest.approx(known["ppl_err"], rel=1e-4)
        assert record["effective"]["anchor"].split()[0] == known["effective"]["anchor"].split()[0]
        same = ("k", "v", "kv_mib", "k_bits", "flash_attn", "recent", "first", "rot_k", "ctx")
        assert {x: record["effective"][x] for x in same} == {x: known["effective"][x] for x in same}
        if record["kld"]:
            for figure in ("mean", "median", "ln_ratio", "ppl_base"):
                assert record["kld"][figure] == pytest.approx(known["kld"][figure], abs=1e-5, rel=1e-5)
            for figure in ("p90", "p99", "max"):  # of single tokens, which 16 bits move more than the mean
                assert record["kld"][figure] == pytest.approx(known["kld"][figure], abs=1e-4, rel=1e-4)
            assert record["kld"]["same_top_pct"] == pytest.approx(known["kld"]["same_top_pct"], abs=2)
        else:
            assert record["decode"]["delta_pct"] == pytest.approx(known["decode"]["delta_pct"], abs=1e-3)
    runs = {tuple(r["run"]["argv"]) for r in here.values()}
    assert len(runs) == 1 and all(r["run"]["cells"] == 6 for r in here.values())


def test_the_figures_of_each_token_lie_beside_the_record(sweep: Sweep) -> None:
    assert sweep.run(PAIRS, "--metrics", "kld").returncode == 0
    record = sweep.records()["turbo3", "kld"]
    folder = next(sweep.cli.results.iterdir())
    tokens = load(folder / record["tokens"]["file"], record["tokens"]["sha256"])
    assert tokens.nll.shape == (2, CTX // 2 - 1)
    assert tokens.nll.mean(axis=1) == pytest.approx(record["by_chunk"]["nll"], rel=1e-6)
    assert tokens.kld.mean() == pytest.approx(record["kld"]["mean"], rel=1e-5)
    assert not json.dumps(record["by_chunk"]).count("nan")


def test_only_what_is_missing_is_run(sweep: Sweep) -> None:
    assert sweep.run("f16:f16,q8_0:q8_0", *ALL).returncode == 0
    before = sweep.records()
    done = sweep.run(PAIRS, *ALL)
    assert done.returncode == 0 and done.stderr.count("(on record)") == 4
    after = sweep.records()
    assert all(after[name] == record for name, record in before.items())
    argv = after["turbo3", "kld"]["run"]["argv"]
    assert [argv[i + 1].split(",")[0] for i, word in enumerate(argv) if word == "--pair"] == ["turbo3:turbo3"]
    assert sweep.run(PAIRS, *ALL).stderr.count("(on record)") == 6


def test_a_reference_that_moved_is_no_reference(sweep: Sweep) -> None:
    assert sweep.run("f16:f16", "--metrics", "kld").returncode == 0
    path = next(sweep.cli.results.glob("*/*f16-f16*.json"))
    record = json.loads(path.read_text())
    record["ppl"] *= 1.001
    path.write_text(json.dumps(record))
    done = sweep.run(PAIRS, "--metrics", "kld")
    assert done.returncode == 3
    assert sweep.statuses("kld") == {"f16": "ok", "q8_0": "base-invalid", "turbo3": "base-invalid"}
    assert "on record: something changed" in done.stderr


def test_more_chunks_are_added_to_those_on_file(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep.run(PAIRS, *ALL, chunks=2).returncode == 0
    assert sweep.run(PAIRS, *ALL, chunks=4).returncode == 0
    whole = Sweep(tmp_path / "whole", sweep.cli.bin_dir, sweep.model, sweep.text)
    assert whole.run(PAIRS, *ALL, chunks=4).returncode == 0
    for (k, metric), record in whole.records().items():
        grown = next(
            r
            for r in (json.loads(p.read_text()) for p in sweep.cli.results.glob("*/*.json"))
            if r["key"] == record["key"]
        )
        assert grown["running_ppl"] == pytest.approx(record["running_ppl"], rel=1e-6), (k, metric)
        if metric == "kld":
            assert grown["by_chunk"]["kld"] == pytest.approx(record["by_chunk"]["kld"], abs=1e-7)
            argv = grown["run"]["argv"]
            assert argv[argv.index("--first-chunk") + 1] == "2" and argv[argv.index("--chunks") + 1] == "2"


def _bad(sweep: Sweep, tmp_path: Path, rule: str) -> Path:
    return faulty(tmp_path / "bin", sweep.cli.bin_dir, rule, "llama-kv-eval")


def test_a_cache_that_kills_the_process_is_found_and_the_others_have_numbers(
    sweep: Sweep, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    mended = tmp_path / "mended"
    rule = f'echo run >> {runs}; case "$*" in *--pair?turbo3:*) [ -e {mended} ] || kill -SEGV $$;; esac'
    pairs = PAIRS + ",q4_0:q4_0,turbo4:turbo4"
    bad = _bad(sweep, tmp_path, rule)
    done = sweep.run(pairs, *ALL, bin_dir=bad)
    assert done.returncode == 3, done.stderr
    for metric in ("kld", "decode"):
        found = sweep.statuses(metric)
        assert found.pop("turbo3") == "crash" and set(found.values()) == {"ok"} and len(found) == 4
    record = sweep.records()["turbo3", "kld"]
    assert record["ppl"] is None and "SIGSEGV" in record["detail"]
    assert len(runs.read_text().split()) <= 6
    mended.touch()
    again = sweep.run(pairs, *ALL, bin_dir=bad)  # only the failed cells are run again
    assert again.returncode == 0 and again.stderr.count("(on record)") == 8


def test_faults_have_their_own_status(sweep: Sweep, tmp_path: Path) -> None:
    rule = """
case "$*" in
  *--pair?q8_0:*) for a; do case "$a" in q8_0:*) a="f16:${a#*:}";; esac; set -- "$@" "$a"; shift; done;;
esac
case "$*" in *--pair?q4_0:*) exec sleep 1000;; esac"""
    bad = _bad(sweep, tmp_path, rule)
    done = sweep.run(PAIRS + ",q4_0:q4_0", "--metrics", "kld", "--timeout", "5", bin_dir=bad)
    assert done.returncode == 3
    found = sweep.statuses("kld")
    assert found == {"f16": "ok", "q8_0": "type-mismatch", "turbo3": "ok", "q4_0": "timeout"}, done.stderr
    assert all((r["ppl"] is None) == (r["status"] != "ok") for r in sweep.records().values())


def test_nan_weights(sweep: Sweep, tmp_path: Path) -> None:
    """A real NaN, in the weights of the last norm: f16/f16 itself is none."""
    from gguf import GGUFReader

    broken = tmp_path / "nan.gguf"
    shutil.copy(sweep.model, broken)
    norm = next(t for t in GGUFReader(str(broken)).tensors if t.name == "output_norm.weight")
    with broken.open("r+b") as file:
        file.seek(int(norm.data_offset))
        file.write(struct.pack("<f", float("nan")) * int(norm.n_elements))
    done = Sweep(sweep.cli.results, sweep.cli.bin_dir, broken, sweep.text).run(PAIRS, "--metrics", "kld")
    assert done.returncode == 3
    assert sweep.statuses("kld") == {"f16": "nan", "q8_0": "base-invalid", "turbo3": "base-invalid"}


def test_a_text_that_is_too_short(sweep: Sweep, tmp_path: Path) -> None:
    """What its bytes cannot tell before it is read: here it has become shorter."""
    short = tmp_path / "short"
    short.write_bytes(sweep.text.read_bytes()[: 2 * CTX])
    bad = _bad(sweep, tmp_path, f'exec "$REAL" "$@" -f {short}')
    done = sweep.run(PAIRS, "--metrics", "kld", chunks=4, bin_dir=bad)
    assert done.returncode == 3
    assert set(sweep.statuses("kld").values()) == {"short-corpus"}
    assert "4 chunk(s) of 64 from chunk 0 on need 256" in done.stderr


def test_f16_alone_needs_no_second_context(sweep: Sweep) -> None:
    assert sweep.run("f16:f16", "--metrics", "ppl").returncode == 0
    record = sweep.records()["f16", "ppl"]
    assert record["run"]["argv"][0].endswith("llama-perplexity")
    assert record["cell"]["engine"] == "llama-perplexity"
    assert sweep.run(PAIRS, "--metrics", "ppl").returncode == 0
    assert sweep.records()["turbo3", "ppl"]["run"]["argv"][0].endswith("llama-kv-eval")


def test_a_build_without_the_tool_is_measured_by_llama_perplexity(sweep: Sweep, tmp_path: Path) -> None:
    old = faulty(tmp_path / "bin", sweep.cli.bin_dir, "")
    done = sweep.run("f16:f16,q8_0:q8_0", "--metrics", "kld", chunks=4, bin_dir=old)
    assert done.returncode == 0, done.stderr
    assert "tokens" not in sweep.records()["q8_0", "kld"]
    asked = sweep.run(PAIRS, "--engine", "kv-eval", bin_dir=old)
    assert asked.returncode == 2 and one_sentence(asked.stderr)
    assert "has no llama-kv-eval" in asked.stderr


def test_until_decided_adds_chunks_to_what_is_undecided(sweep: Sweep, tmp_path: Path) -> None:
    """q8_0 is decided before turbo3, whose differences are noisier; no chunk is measured twice."""
    log = tmp_path / "runs"
    words = (
        """'/^--pair$/{getline; print $0} /^--(first-chunk|chunks)$/{printf "%s ", $0; getline; print $0}'"""
    )
    told = _bad(sweep, tmp_path, f'printf "%s\\n" "$@" | awk {words} >> {log}')
    args = ("--pairs", PAIRS, "--recent", "0", "--chunks", "4", "--metrics", "kld")
    long = tmp_path / "long"
    long.write_bytes(sweep.text.read_bytes() * 6)
    model = ("--model", sweep.model, "--corpus", long, "--ctx", str(CTX))
    until = ("--until-decided", "2", "--max-chunks", "32")
    done = sweep.cli.sweep(*model, *args, *until, bin_dir=told)
    assert done.returncode == 0, done.stderr
    said = {line.split(":")[0].split()[-1]: line for line in done.stdout.splitlines() if " after " in line}
    assert said.keys() == {"q8_0/q8_0", "turbo3/turbo3"}
    assert "equivalent after" in said["q8_0/q8_0"] and "after 32 chunks" in said["turbo3/turbo3"]
    assert "of 2 pairs decided in" in done.stderr
    runs = log.read_text()
    assert runs.count("q8_0:q8_0") < runs.count("turbo3:turbo3")
    starts = [int(line.split()[1]) for line in runs.splitlines() if line.startswith("--first-chunk")]
    counts = [int(line.split()[1]) for line in runs.splitlines() if line.startswith("--chunks")]
    assert starts[0] == 0 and all(a + b == c for a, b, c in zip(starts, counts, starts[1:], strict=False))
    kept = [json.loads(p.read_text()) for p in sweep.cli.results.glob("*/*.kld.*.json")]
    assert all(r["by_chunk"]["sequential"] for r in kept if r["cell"]["k"] != "f16")
    once_more = sweep.cli.sweep(*model, *args, *until, bin_dir=told)
    assert log.read_text() == runs, "all of it is on record"
    assert once_more.stdout == done.stdout


def test_until_decided_needs_figures_of_each_token(sweep: Sweep) -> None:
    done = sweep.run(PAIRS, "--until-decided", "1", "--engine", "llama-perplexity")
    assert done.returncode == 2 and one_sentence(done.stderr)
    assert "needs figures of each token" in done.stderr
    assert sweep.run(PAIRS, "--until-decided", "0").returncode == 2
    assert "nothing is ever decided" in sweep.run(PAIRS, "--until-decided", "1", "--no-reference").stderr


def test_on_a_terminal_it_shows_where_it_is_and_ends_with_the_front(sweep: Sweep, prose: CorpusFile) -> None:
    """Of each running cell ΔPPL with its interval, of the sweep the time left; then table and front."""
    sweep.text = prose.path  # long enough for a picture between the first chunk and the last
    args = sweep.args("--pairs", PAIRS, "--metrics", "kld", "--chunks", "24")
    code, said = sweep.cli.on_a_terminal(*sweep.cli.sweep_args(*args))
    assert code == 0, said
    assert re.search(r"turbo3/turbo3 kld .* \d+/24 ΔPPL [+−][\d.]+ \([+−][\d.]+ … [+−][\d.]+\) %", said), said
    assert re.search(r"cells .* about \d+ s left", said)
    assert "KL divergence from f16/f16, nats, by size" in said and "●" in said.split("by size")[1]
