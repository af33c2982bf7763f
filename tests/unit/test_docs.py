"""What the reference pages list is what the sources have."""

from __future__ import annotations

import re

from turbo_eval.records.record import STATUSES
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
