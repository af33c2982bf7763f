"""What is released, wheel and sdist without llama.cpp, installed elsewhere from the package index alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Installed
from tests.support import toy
from tests.support.harness import one_sentence
from tests.support.workflow import environment
from turbo_eval.llama import patches, source
from turbo_eval.util import paths

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(installed: Installed) -> Call:
    """The installed turbo-eval in a folder, with nothing of this checkout in its environment."""

    def run(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        env = environment(installed.python) | {"COLUMNS": "200"}
        return subprocess.run(
            [installed.command, *args],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    return run


def test_an_index_takes_them(installed: Installed) -> None:
    """The README that they carry renders, and their metadata is sound."""
    packages = (str(installed.wheel), str(installed.sdist))
    check = [sys.executable, "-m", "twine", "check", "--strict", *packages]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_what_is_in_them(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"turbo_eval"}
    series = [patch.name for patch in patches.read_series()]
    for name in (*series, "series", "pin"):
        assert f"turbo_eval/data/patches/{name}" in names
    assert "turbo_eval/data/configs/models.toml" in names
    assert "turbo_eval/data/workflows/turbo-eval-run.yml" in names
    with tarfile.open(installed.sdist) as archive:
        packed = archive.getnames()
    assert not [name for name in packed if "/llama.cpp" in name or "/build/" in name or "/results/" in name]
    assert installed.wheel.stat().st_size < 1_500_000
    assert installed.sdist.stat().st_size < 3_000_000


def test_version(installed: Installed, call: Call, tmp_path: Path) -> None:
    version = installed.wheel.name.split("-")[1]
    said = call("--version", cwd=tmp_path).stdout
    made_for = f"llama.cpp {source.pin()[:12]}, {len(patches.read_series())} patches"
    assert said == f"turbo-eval {version} ({made_for} {patches.series_sha256()[:12]})\n"


@pytest.mark.parametrize(
    ("tag", "git", "expected"),
    [("", True, "0.1.dev1+g"), ("v1.2.3", True, "1.2.3"), ("", False, "0.1.dev0")],
    ids=["no tags", "tagged", "no git"],
)
def test_version_comes_from_git(tmp_path: Path, tag: str, git: bool, expected: str) -> None:
    clone = tmp_path / "clone"
    toy.run(
        "git", "clone", "--quiet", "--depth", "1", "--no-tags", paths.shipped().as_uri(), clone, cwd=tmp_path
    )
    if tag:
        toy.run("git", "tag", tag, cwd=clone)
    if not git:
        (clone / ".git").rename(tmp_path / "elsewhere")
    toy.run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path / "dist", clone, cwd=tmp_path)
    (sdist,) = (tmp_path / "dist").iterdir()
    assert sdist.name.removeprefix("turbo_eval-").startswith(expected)
    assert git or sdist.name == f"turbo_eval-{expected}.tar.gz"


def test_outside_a_project(call: Call, tmp_path: Path) -> None:
    assert "smollm2-135m" in call("models", "list", cwd=tmp_path).stdout
    done = call("build", "cpu", cwd=tmp_path)
    assert done.returncode == 4 and one_sentence(done.stderr)
    assert "there is no turbo-eval project" in done.stderr and "turbo-eval init" in done.stderr


def test_from_nothing_to_a_table(call: Call, installed: Installed, tmp_path: Path) -> None:
    """init, build and sweep: source, model and text come from where a fresh machine gets them."""
    done = call("init", "demo", cwd=tmp_path)
    assert done.returncode == 0 and "next: cd demo && turbo-eval build cpu" in done.stdout
    demo = tmp_path / "demo"
    done = call("build", "cpu", cwd=demo)
    assert done.returncode == 0, done.stderr
    built = json.loads((demo / "turbo-eval" / "build" / "cpu" / "turbo-eval-build.json").read_text())
    assert built["tree"] == patches.status().tree, "the same tree as in the clone"
    assert (built["pin"], built["dirty"], built["patched"]) == (source.pin(), False, True)

    quick = ("--model", "smollm2-135m", "--ctx", "256", "--chunks", "2", "--pairs", "f16:f16,turbo4:turbo4")
    done = call("sweep", *quick, "--json", cwd=demo)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    record = json.loads(next((demo / "turbo-eval" / "results").rglob("*.json")).read_text())
    assert record["provenance"]["harness"] == installed.wheel.name.split("-")[1]
    assert record["provenance"]["series"] == patches.series_sha256()

    done = call("sweep", *quick, "--metrics", "greedy", cwd=demo)
    assert done.returncode == 4 and "run `turbo-eval bindings`" in done.stderr
    assert call("bindings", cwd=demo).returncode == 0
    done = call("sweep", *quick, "--metrics", "greedy", cwd=demo)
    assert done.returncode == 0, done.stderr

    done = call("doctor", cwd=demo)
    assert done.returncode == 0, done.stderr
    assert str(demo / "turbo-eval" / "build" / "cpu" / "bin") in done.stdout
    assert os.path.realpath(paths.shipped()) not in done.stdout


def test_series_cannot_be_changed_from_a_package(call: Call, tmp_path: Path) -> None:
    call("init", "demo", cwd=tmp_path)
    for verb in (["refresh"], ["check"], ["rebase", "b1"]):
        done = call("patches", *verb, cwd=tmp_path / "demo")
        assert done.returncode == 2 and one_sentence(done.stderr)
        assert "change it in a clone" in done.stderr
