"""Verdicts on real runs: the reference is measured, numbers are kept, no file of the user's folder runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.harness import QUICK, Cli, faulty
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama import bindings
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities

pytestmark = pytest.mark.build


@pytest.fixture
def cli(tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile) -> Cli:
    return Cli(tmp_path / "results", build.bin_dir)


def deltas(text: str) -> dict[str, float | None]:
    return {f"{r['k']}:{r['v']}": r["delta_pct"] for r in json.loads(text)}


def test_sweep_measures_the_reference_it_was_not_asked_for(cli: Cli) -> None:
    done = cli.sweep("--pairs", "q4_0:q4_0,q8_0:q8_0", *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    found = deltas(done.stdout)
    ppl = {f"{r['k']}:{r['v']}": r["ppl"] for r in json.loads(done.stdout)}
    assert set(found) == {"f16:f16", "q4_0:q4_0", "q8_0:q8_0"}
    assert found["q4_0:q4_0"] == 100 * (ppl["q4_0:q4_0"] / ppl["f16:f16"] - 1)
    again = cli.sweep("--pairs", "q4_0:q4_0,f16:f16", *QUICK, "--json")
    assert deltas(again.stdout)["q4_0:q4_0"] == found["q4_0:q4_0"], "asked for or not, it is the same one"
    table = cli.run("table", cli.results)
    assert "ΔPPL against f16/f16" in table.stdout.replace("\n", " ")


def test_a_kl_sweep_runs_f16_once_and_keeps_its_record(cli: Cli, tmp_path: Path, build: Build) -> None:
    """The run that writes the base is the reference's: on record, its log its own."""
    runs = tmp_path / "runs"
    counted = faulty(
        tmp_path / "bin",
        build.bin_dir,
        f'case "$*" in *--help*|*--version*) ;; *) echo "$@" >> {runs};; esac',
    )
    env = {"TURBO_EVAL_CACHE": str(tmp_path / "cache")}
    model = json.dumps(str(_model_path()))
    args = (
        "--model",
        json.loads(model),
        "--pairs",
        "q8_0:q8_0",
        "--metrics",
        "kld",
        "--ctx",
        "256",
        "--chunks",
        "1",
        "--json",
    )
    done = cli.sweep(*args, "--corpus", _corpus_path(), bin_dir=counted, env=env)
    assert done.returncode == 0, done.stderr
    assert len(runs.read_text().splitlines()) == 2, runs.read_text()
    records = {(r["cell"]["k"], r["cell"]["metric"]): r for r in cli.records()}
    assert set(records) == {("f16", "ppl"), ("q8_0", "kld")}
    exact = records["f16", "ppl"]
    assert exact["cell"]["anchor"] == "off" and exact["status"] == "ok"
    log = (cli.results / exact["run"]["log"]).read_text()
    assert f"PPL = {exact['ppl']:.4f}" in log
    assert deltas(done.stdout)["q8_0:q8_0"] is not None


def _model_path() -> Path:
    from turbo_eval.inputs.models import resolve_model

    return resolve_model("smollm2-135m").path


def _corpus_path() -> Path:
    from turbo_eval.inputs.corpora import default_name, resolve_corpus

    return resolve_corpus(default_name()).path


def test_fresh_with_a_timeout_keeps_the_number(cli: Cli) -> None:
    args = ("--pairs", "f16:f16", *QUICK)
    assert cli.sweep(*args).returncode == 0
    place = next(p for p in cli.results.glob("*/*.json"))
    before = place.read_bytes()
    late = cli.sweep(*args, "--fresh", "--timeout", "0.05")
    assert late.returncode == 3 and "timeout" in late.stderr and "the number of before is kept" in late.stderr
    assert place.read_bytes() == before
    kept = [json.loads(p.read_text()) for p in place.parent.glob("history/*.json")]
    assert [r["status"] for r in kept] == ["timeout"]
    assert cli.sweep(*args, "--json").returncode == 0


MODULE = "from pathlib import Path\nPath({mark!r}).write_text(__name__)\nraise SystemExit('executed')\n"


def trap(folder: Path) -> Path:
    """Modules that leave a mark where they are loaded; returns the mark."""
    folder.mkdir()
    mark = folder / "executed"
    for name in ("dask", "distributed", "numpy", "llama_cpp", "psutil", "pydantic", "tornado", "rich"):
        (folder / f"{name}.py").write_text(MODULE.format(mark=str(mark)))
    return mark


def command() -> str:
    import sys

    return str(Path(sys.executable).parent / "turbo-eval")


def test_files_in_the_current_folder_are_not_executed_by_workers(cli: Cli, tmp_path: Path) -> None:
    mark = trap(tmp_path / "folder")
    if psutil.cpu_count() == 1:
        pytest.skip("two jobs need two cores")
    args = cli.sweep_args("--pairs", "f16:f16,q8_0:q8_0", *QUICK, "--jobs", "2")
    done = subprocess.run(
        [command(), *map(str, args)], cwd=tmp_path / "folder", env=cli.env(), capture_output=True, text=True
    )
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr


def test_files_in_the_current_folder_are_not_executed_by_generation(cli: Cli, tmp_path: Path) -> None:
    bindings.require()
    mark = trap(tmp_path / "folder")
    toml = tmp_path / "folder" / "greedy.toml"
    toml.write_text(
        'pairs = ["q8_0:q8_0"]\nmetrics = ["greedy"]\n'
        "greedy = { prompts = 1, prompt_tokens = 16, tokens = 4 }\n"
    )
    done = subprocess.run(
        [command(), *map(str, cli.sweep_args("greedy.toml"))],
        cwd=tmp_path / "folder",
        env=cli.env(),
        capture_output=True,
        text=True,
    )
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr


def test_a_killed_worker_of_jobs_is_replaced(cli: Cli, tmp_path: Path, build: Build) -> None:
    """Both workers are killed, one after the other; the sweep goes on with others."""
    if (psutil.cpu_count() or 1) < 2:
        pytest.skip("two jobs need two cores")
    args = cli.sweep_args(
        "--pairs", "f16:f16,q8_0:q8_0,q4_0:q4_0,q5_0:q5_0", "--ctx", "64", "--chunks", "30", "--jobs", "2"
    )
    process = subprocess.Popen(
        cli.command(*args), env=cli.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed: set[int] = set()
    until = time.monotonic() + 300
    while len(killed) < 2 and process.poll() is None and time.monotonic() < until:
        for child in psutil.Process(process.pid).children():
            try:
                if "worker" in child.cmdline() and child.pid not in killed and child.children():
                    child.send_signal(signal.SIGKILL)
                    killed.add(child.pid)
            except psutil.Error:
                continue
        time.sleep(0.02)
    out, err = process.communicate(timeout=600)
    assert len(killed) == 2, err
    assert process.returncode == 0, err
    assert len(re.findall(r"\bok\b", out)) == 4, out


def test_recommend_measures_what_is_missing(cli: Cli, build: Build) -> None:
    """With f16 and q8_0 on record alone it does not stop at q8_0."""
    if "turbo3" not in capabilities(build).cache_types:
        pytest.skip("an unpatched build has no turbo types")
    pairs = ("--pairs", "f16:f16,q8_0:q8_0", "--ctx", "128", "--chunks", "4")
    assert cli.sweep(*pairs).returncode == 0
    args = ["recommend", "smollm2-135m", "--max-delta-ppl", "60%", "--ctx", "8192", "--threads", "1"]
    done = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert done.returncode == 0, done.stderr
    assert "not on record: turbo3/turbo3" in done.stderr and " min " in done.stderr
    first = next(line for line in done.stdout.splitlines() if line.startswith("recommended"))
    assert "turbo3/turbo3" in first and "±" in first, done.stdout
    measured = {(r["cell"]["k"], r["cell"]["v"]) for r in cli.records()}
    assert measured == {("f16", "f16"), ("q8_0", "q8_0"), ("turbo3", "turbo3")}, "larger ones cannot win"
    line = next(line for line in done.stdout.splitlines() if line.startswith("run  "))
    assert "-ctk turbo3 -ctv turbo3" in line
    again = cli.run(*args, "--bin-dir", cli.bin_dir, "--results", cli.results)
    assert again.stdout == done.stdout and "measuring" not in again.stderr
