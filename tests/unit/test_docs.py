"""What the reference pages list is what the sources have."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from tests.integration import test_tutorial as tutorial
from tests.support import prose
from turbo_eval.analysis.picture.points import front
from turbo_eval.analysis.report import worth_showing
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.cli import COMMANDS, load
from turbo_eval.records.record import STATUSES
from turbo_eval.records.store import read_all
from turbo_eval.util.paths import repo_root

ROOT = repo_root()
REFERENCE = ROOT / "docs" / "reference"


def first_cells(page: str) -> list[str]:
    """What is in backticks in the first column of a page's tables."""
    lines = (REFERENCE / page).read_text().splitlines()
    firsts = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return [name for cell in firsts for name in re.findall(r"`([^`]+)`", cell)]


def test_every_status_is_told() -> None:
    assert first_cells("statuses.md") == list(STATUSES)


def test_every_variable_is_told() -> None:
    places = [ROOT / "turbo_eval", ROOT / ".github"]
    files = [f for place in places for f in place.rglob("*") if f.suffix in (".py", ".yml")]
    used = {name for f in files for name in re.findall(r"TURBO_EVAL_[A-Z_]*[A-Z]", f.read_text())}
    told = first_cells("environment.md")
    worker = "TURBO_EVAL_WORKER"  # its options are made of their names
    told = [worker + name if name.startswith("_") else name for name in told]
    assert {n for n in told if n.startswith("TURBO_EVAL") and not n.startswith(worker)} == used - {
        n for n in used if n.startswith(worker)
    }
    assert {n for n in used if n.startswith(worker + "_")} <= set(told)


def test_every_option_of_the_patches_is_told() -> None:
    added: list[str] = []
    for patch in sorted((ROOT / "patches").glob("*.patch")):
        text = patch.read_text(errors="replace")
        hunks = re.findall(
            r"^diff --git a/common/arg\.cpp.*?(?=^diff --git|\Z)", text, re.DOTALL | re.MULTILINE
        )
        for line in re.findall(r'^\+ +\{("--?[^}]+")\}', "".join(hunks), re.MULTILINE):
            added += re.findall(r'"(--?[\w-]+)"', line)
    assert len(added) > 8
    assert sorted(first_cells("llama-flags.md")) == sorted(set(added))


def test_metrics_point_to_sections_that_exist() -> None:
    from turbo_eval.metrics import METRICS

    for metric in METRICS.values():
        path, _, anchor = metric.docs.partition("#")
        headings = re.findall(r"^## (.+)$", (ROOT / path).read_text(), re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings], metric.name


# -- README and Start ------------------------------------------------------------------------------

EASY = ("README.md", "docs/start/index.md")
GLOSSARY = prose.terms((REFERENCE / "glossary.md").read_text())
EXPLANATIONS = (
    *("architecture", "cache-types", "cpu-kernels", "cuda", "exact-window", "metal"),
    "why-symmetric-turbo-failed",
)
# Words of the glossary that these pages use in their everyday sense as well.
EVERYDAY = {"Cell", "Decode", "Pair", "Profile", "Record", "Reference"}
# Commands of these pages that test_tutorial.py doesn't run, and what does, or why nothing.
NOT_RUN = {
    "git clone <this repository> turbo-eval": "the address is the reader's; a test runs in a clone",
    "cd turbo-eval": "a test runs in the clone",
    "source .venv/bin/activate": "of the reader's shell",
    "apt-get install git make g++ python3 python3-venv": ".ci/run installs these on a fresh Debian",
    "make docs": "make check builds the documentation",
    "make build-vulkan": "needs glslc and Vulkan's headers, which CI does not install yet",
    "make build-cuda": "needs the CUDA toolkit; tests/kernels/test_cuda_compile.py compiles its sources",
    "make build-metal": "needs a Mac; .github/workflows/metal.yml runs it",
    "turbo-eval bench --model FILE": "tests/integration/test_bench.py, on files of its own",
    "turbo-eval gate configs/gates.toml": "tests/integration/test_gate_real.py, after its sweep",
    "turbo-eval selftest": "tests/integration/test_selftest.py",
    "turbo-eval tune": "tests/integration/test_tune.py, on files of its own",
    "turbo-eval": "test_cli.py, in every state of a machine",
    "make build-cpu": "the build of every test",
    "turbo-eval report": "test_tutorial.py, of records of its own",
}


@pytest.mark.parametrize("page", EASY)
def test_it_reads_easily(page: str) -> None:
    text = (ROOT / page).read_text()
    assert prose.hard(text) == []
    assert prose.unexplained(text, GLOSSARY) == []


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_explanations_are_prose(name: str) -> None:
    """Short sentences and paragraphs, and a term is a link to the glossary where it comes first."""
    text = (ROOT / "docs" / "explanation" / f"{name}.md").read_text()
    assert prose.hard(text) == []
    assert prose.unexplained(text, {t: a for t, a in GLOSSARY.items() if t not in EVERYDAY}) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_measures_of_prose_measure() -> None:
    long = "word " * 36 + "end. Short one."
    assert [line.split(":")[0] for line in prose.hard(long)] == ["37 words"]
    assert [line.split(":")[0] for line in prose.hard("One. Two. Three. Four. Five. Six.")] == ["6 sentences"]
    glossary = prose.terms("## Anchor\n## KLD\n## Pair\n## turbo2, turbo3\n")
    told = "[turbo3](glossary.md#turbo2-turbo3) and turbo2: an anchor and `kld`, a [pair](glossary.md#pair)."
    assert prose.unexplained(told, glossary) == ["Anchor"]
    assert prose.unexplained("A pair. Another [pair](glossary.md#pair).", glossary) == ["Pair"]


@pytest.mark.parametrize("page", [*EASY, "docs/how-to/own-model.md", "docs/how-to/serving.md"])
def test_every_command_is_one(page: str) -> None:
    """turbo-eval's take what is given to them, make's targets exist, and on the easy pages each is run."""
    makefile = (ROOT / "Makefile").read_text()
    for command in prose.commands((ROOT / page).read_text()):
        words = shlex.split(command)
        if words[0] == "make":
            target = re.sub(r"build-\w+", "build-%", words[1])
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        elif words[0] == "turbo-eval" and len(words) > 1:
            assert words[1] in COMMANDS, command
            load(words[1]).make_context(
                words[1], words[2:], resilient_parsing=len(words) == 2 or "FILE" in words
            )
        if page in EASY:
            assert (command in NOT_RUN) != (command in tutorial.RUN), f"{page}: {command}"


def test_nothing_is_listed_that_no_page_says() -> None:
    said = {command for page in EASY for command in prose.commands((ROOT / page).read_text())}
    assert set(NOT_RUN) | tutorial.RUN == said


def test_the_picture_is_of_the_records() -> None:
    """docs/img/front.svg is what `turbo-eval report … --front docs/img/front.svg --at 8192` draws."""
    records = read_all([ROOT / "results" / "reference" / "smollm2-135m-f32-cpu"])
    groups = worth_showing([rows for _, rows in by_setting(summarize(records))])
    drawn = front(groups[0], 8192)
    assert len(groups) == 1 and drawn is not None and len(drawn.points) == 9
    assert f"<dc:description>{drawn.said()}</dc:description>" in (ROOT / "docs/img/front.svg").read_text()


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("citation-file-format", ["CITATION.cff"]),
        ("github-issue-forms", sorted(map(str, (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")))),
        ("github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
    ],
)
def test_what_the_server_reads_is_of_its_schema(schema: str, files: list[str]) -> None:
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_in_the_changelog() -> None:
    version = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert re.search(rf"^## {re.escape(version[1])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
