"""turbo-eval position on the records of results/reference, and what it says where there is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turbo_eval.analysis.picture.position import courses
from turbo_eval.cli import load
from turbo_eval.records.store import read_all
from turbo_eval.util.paths import repo_root

REFERENCE = repo_root() / "results" / "reference"


def _with_tokens() -> Path:
    for folder in sorted(REFERENCE.glob("*/*/tokens")):
        return folder.parents[1]
    pytest.fail("no reference records have figures of each token")


def test_figures_and_picture(tmp_path: Path) -> None:
    folder, out = _with_tokens(), tmp_path / "position.svg"
    done = CliRunner().invoke(load("position"), [str(folder), "--spans", "4", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    machine = next(path for path in folder.iterdir() if path.is_dir())
    found = courses([(r, machine) for r in read_all([folder])], "kld", 4)
    assert len(told) == len(found) > 1
    by_cache = {(r.cell.named(), r.cell.ctx): r.kld.mean for r in read_all([folder]) if r.kld}
    for one, course in zip(told, found, strict=True):
        mean = by_cache[course.name.replace("/", ":", 1), course.ctx]
        assert one["kld"][0] == pytest.approx(mean, rel=1e-5)
        assert sum(s["kld"][0] for s in one["spans"]) / 4 == pytest.approx(mean, rel=0.02)
        assert one["spans"][-1]["last"] == course.ctx - 1
    assert out.read_text().count("KL divergence over context length") >= 1


def test_nothing_to_show_says_what_to_measure(tmp_path: Path) -> None:
    done = CliRunner().invoke(load("position"), [str(tmp_path)])
    assert done.exit_code != 0
    assert "--metrics kld" in getattr(done.exception, "next_step", "")
