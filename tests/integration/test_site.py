"""The documentation builds without a warning, and what is wrong in it ends the build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_eval.util.paths import repo_root


def build(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(root / "built")]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The documentation and what it takes from beside docs/, to break."""
    root = repo_root()
    for name in ("docs", "patches", "metal-emu", "configs"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("build", "*.patch"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(root / name, tmp_path)
    return tmp_path


def test_it_builds(copy: Path) -> None:
    done = build(copy)
    assert done.returncode == 0, done.stderr
    names = {p.relative_to(copy / "built").as_posix() for p in (copy / "built").rglob("*.html")}
    assert {"start/index.html", "reference/cli.html", "project/contributing.html"} <= names
    # a link to a file of the repository leads to its page
    text = (copy / "built" / "how-to" / "index.html").read_text()
    assert 'href="../project/contributing.html#moving-the-pin"' in text


@pytest.mark.parametrize(
    ("page", "broken", "said"),
    [
        ("docs/lab/index.md", "[x](nowhere.md)", "nowhere.md"),
        ("docs/lab/index.md", "[x](cuda.md#no-such-heading)", "no-such-heading"),
        ("CONTRIBUTING.md", "[x](docs/nowhere.md)", "nowhere.md"),
        ("docs/lab/index.md", "[x](../../nowhere.toml)", "nowhere.toml"),
        ("docs/lab/unlisted.md", "# In no menu", "unlisted.md"),
    ],
)
def test_what_is_wrong_ends_it(copy: Path, page: str, broken: str, said: str) -> None:
    with (copy / page).open("a") as file:
        file.write(f"\n{broken}\n")
    done = build(copy)
    assert done.returncode != 0 and said in done.stderr
