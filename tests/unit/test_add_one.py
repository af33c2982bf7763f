"""A cache type, a metric and a backend of one's own, each added to a copy of the package in at most 3 files.

CONTRIBUTING.md says how ("Where to add …"). The tool is a stand-in that prints a log of the real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden import TOOL, World, world
from turbo_eval.metrics import METRICS
from turbo_eval.metrics.base import Metric
from turbo_eval.util import paths

LOGS = Path(__file__).parents[1] / "data" / "logs"


class Copy:
    """The package in a folder of its own, and what was changed in it."""

    def __init__(self, folder: Path, made: World) -> None:
        self.folder, self.world = folder, made
        shutil.copytree(
            paths.shipped() / "turbo_eval",
            folder / "turbo_eval",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for name in ("configs", "patches"):
            (folder / name).symlink_to(paths.shipped() / name)
        self.changed: set[str] = set()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        self.changed.add(name)

    def edit(self, name: str, *changes: tuple[str, str]) -> None:
        text = (self.folder / name).read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        self.write(name, text)

    def run(self, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "turbo_eval", *map(str, args)],
            cwd=self.folder,
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def python(self, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def tool(self, text: str) -> Path:
        folder = self.folder / "bin"
        folder.mkdir()
        tool = folder / "llama-perplexity"
        tool.write_text(text)
        tool.chmod(0o755)
        return folder

    def what(self, pairs: str, tools: Path) -> list[str | Path]:
        made = self.world
        what: list[str | Path] = ["--model", made.model, "--corpus", made.corpus, "--pairs", pairs]
        return [*what, "--chunks", "2", "--bin-dir", tools, "--results", self.folder / "results"]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    with world() as made:
        kept = tmp_path / "world"
        shutil.copytree(made.folder, kept)
        made.folder, made.model, made.corpus = kept, kept / made.model.name, kept / made.corpus.name
        return Copy(tmp_path / "copy", made)


def test_a_cache_type_is_one_row(copy: Copy) -> None:
    copy.edit(
        "turbo_eval/formats/cache_types.py",
        (
            '        CacheType("iq4_nl"',
            '        CacheType("own5", 32, 20, mse=6e-3),\n        CacheType("iq4_nl"',
        ),
    )
    assert copy.changed == {"turbo_eval/formats/cache_types.py"}
    tools = copy.tool(TOOL.replace("turbo3, turbo4", "turbo3, turbo4, own5"))
    planned = copy.run("plan", *copy.what("q8_0:own5", tools), COLUMNS="200")
    assert planned.returncode == 0 and "q8_0/own5" in planned.stdout, planned.stderr
    near = copy.run("plan", *copy.what("q8_0:own6", tools))
    assert near.returncode == 2 and "'own5'" in near.stderr
    checks = (
        "from turbo_eval.selftest.checks import all_checks; print('attention own5:turbo3' in all_checks())"
    )
    assert copy.python(checks) == "True"
    size = "from turbo_eval.formats.cache_types import kv_mib; "
    size += "print(kv_mib('own5', 'own5', n_layer=1, n_head_kv=1, dim_k=64, dim_v=64, ctx=1024))"
    assert copy.python(size) == str(1024 * 128 * 5 / 8 / 2**20)


METRIC = '''
from turbo_eval.metrics.base import Bound, Column, Metric, Options, n
from turbo_eval.metrics.tool import execute, record_of
from turbo_eval.records.record import Effective


class LinesOptions(Options):
    factor: n.Count = 2


class Lines(Metric):
    """How many lines the tool's help has, times a factor: no use, but all that a metric does."""

    name = "lines"
    options = LinesOptions
    columns = (Column("help lines", lambda r: r.figures.get("lines"), "{:.1f}"),)
    bounds = (
        Bound(
            "max_lines",
            n.Percent,
            lambda r: r.figures.get("lines"),
            lambda r: f"{r.figures['lines']:g} lines",
            "no lines are on record",
        ),
    )

    def measure(self, job, bench, on_progress, references):
        argv = [str(bench.build.tool("llama-perplexity")), "--help"]
        outcome, run = execute(job.cell, argv, bench, bench.store.log_path(job.cell), on_progress)
        count = len(outcome.text.splitlines()) * job.cell.options["factor"]
        return record_of(job.cell, run, bench, Effective(), None, figures={"lines": float(count)})

    def words(self, record):
        return f"{record.figures['lines']:g} lines of help"
'''


def test_a_metric_is_a_file_and_a_registry_line(copy: Copy) -> None:
    copy.write("turbo_eval/metrics/lines.py", METRIC)
    copy.edit(
        "turbo_eval/metrics/__init__.py",
        (
            "from turbo_eval.metrics.needle",
            "from turbo_eval.metrics.lines import Lines\nfrom turbo_eval.metrics.needle",
        ),
        ("        NeedleRetrieval(),\n", "        NeedleRetrieval(),\n        Lines(),\n"),
    )
    assert len(copy.changed) <= 3
    tools = copy.tool(TOOL)
    config = copy.folder / "own.toml"
    sweep = f'model = "{copy.world.model}"\ncorpus = "{copy.world.corpus}"\npairs = ["q8_0:turbo3"]\n'
    sweep += 'metrics = ["lines"]\nchunks = 2\n'
    config.write_text(f"{sweep}[lines]\nfactor = 3\n")
    place = ("--bin-dir", tools, "--results", copy.folder / "results")
    swept = copy.run("sweep", config, *place, "--json")
    assert swept.returncode == 0, swept.stderr
    (row,) = (r for r in json.loads(swept.stdout) if r["metric"] == "lines")
    assert row["lines"] == 12.0 and "12 lines of help" in swept.stderr
    table = copy.run("table", copy.folder / "results", "--format", "markdown")
    assert "help lines" in table.stdout and "12.0" in table.stdout
    for bound, code, words in ((12, 0, "pass"), (11, 1, "12 lines, at most 11 is allowed")):
        gate = copy.folder / "gate.toml"
        check = f'[[check]]\npair = "q8_0:turbo3"\nmax_lines = {bound}\n'
        gate.write_text(f"[sweep]\n{sweep}[sweep.lines]\nfactor = 3\n{check}")
        judged = copy.run("gate", gate, *place)
        assert judged.returncode == code and words in judged.stdout + judged.stderr, judged.stderr
    wrong = copy.folder / "wrong.toml"
    wrong.write_text(f"{sweep}[lines]\nfacter = 3\n")
    refused = copy.run("sweep", wrong, *place)
    assert refused.returncode == 2 and "perhaps you meant 'factor'" in refused.stderr


BACKEND = """
from turbo_eval.llama.backends.base import Backend


class Own(Backend):
    name = "own"
    title = "Own"
    switch = "GGML_OWN"
    library = "ggml-own"
    registries = ("OWN",)
    gpu = True
"""


def test_a_backend_is_a_file_and_a_registry_line(copy: Copy) -> None:
    copy.write("turbo_eval/llama/backends/own.py", BACKEND)
    copy.edit(
        "turbo_eval/llama/backends/__init__.py",
        ("import Vulkan\n", "import Vulkan\nfrom turbo_eval.llama.backends.own import Own\n"),
        ("        Vulkan(),\n", "        Vulkan(),\n        Own(),\n"),
    )
    assert len(copy.changed) <= 3
    unknown = copy.run("build", "nothing")
    assert "choose one of cpu, metal, cuda, vulkan, own" in unknown.stderr
    options = (
        "from turbo_eval.llama.backends import cmake_options as o; print(o('own'), o('cpu')['GGML_OWN'])"
    )
    on, off = copy.python(options).rsplit(" ", 1)
    assert "'GGML_OWN': 'ON'" in on and "'GGML_CUDA': 'OFF'" in on and off == "OFF"
    # A real log of a GPU, printed only if layers are sent there; then one whose attention ran on the CPU.
    for number, (log, pair, status) in enumerate(
        (("cuda", "turbo3:turbo3", "ok"), ("cuda-fallback", "iq4_nl:iq4_nl", "cpu-fallback"))
    ):
        shutil.rmtree(copy.folder / "bin", ignore_errors=True)
        logged = f'case " $* " in *" -ngl 999 "*) cat {LOGS / log}.log; exit ;; esac\n'
        tools = copy.tool(TOOL.replace("#!/bin/sh\n", "#!/bin/sh\n" + logged))
        (tools / "libggml-own.so").touch()
        what = copy.what(pair, tools)
        swept = copy.run("sweep", *what, "--backend", "own", "--no-reference", "--json")
        (row,) = json.loads(swept.stdout)
        assert (row["backend"], row["status"]) == ("own", status), (number, swept.stderr)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda m: m.name)
def test_every_metric_says_where_its_method_is_described(metric: Metric) -> None:
    page, _, anchor = metric.docs.partition("#")
    headings = re.findall(r"^#+ (.+)$", (paths.repo_root() / page).read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
