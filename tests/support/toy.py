"""A whole project in miniature, for tests: real git, real cmake, an upstream of two source files."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

UPSTREAM = {
    "CMakeLists.txt": """\
cmake_minimum_required(VERSION 3.14)
project(toy C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(llama-perplexity main.c add.c)
""",
    "main.c": '#include <stdio.h>\nint add(int, int);\nint main(void) {\n    printf("%d\\n", add(1, 2));\n'
    "    return 0;\n}\n",
    "add.c": "int add(int a, int b) {\n    return a + b;\n}\n",
}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command, return its stdout; fails the test when it fails."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def commit(repo: Path, message: str, *options: str) -> str:
    """Commit everything in `repo`; the commit's id."""
    run("git", "add", "--all", cwd=repo)
    run("git", "commit", "--quiet", "--message", message, *options, cwd=repo)
    return run("git", "rev-parse", "HEAD", cwd=repo).strip()


@dataclass
class Toy:
    """`root` is what TURBO_EVAL_ROOT points at; `upstream` the repository its submodule comes from."""

    root: Path
    upstream: Path
    pin: str

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def submodule(self) -> Path:
        return self.root / "llama.cpp"

    @property
    def worktree(self) -> Path:
        return self.root / "build" / "src"

    def patch(self, name: str, old: str, new: str, message: str) -> str:
        """Replace text in a file of the worktree and commit."""
        file = self.worktree / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        return commit(self.worktree, message)

    def explain(self) -> None:
        """Mention every patch in patches/README.md."""
        names = (patch.name for patch in self.patches.glob("*.patch"))
        (self.patches / "README.md").write_text("\n".join(names))


def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Build the miniature in `folder` and point TURBO_EVAL_ROOT and TURBO_EVAL_CACHE at it."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Toy Maker")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "toy@example.org")
    upstream, root = folder / "upstream", folder / "root"
    upstream.mkdir(parents=True)
    run("git", "init", "--quiet", "--initial-branch=master", cwd=upstream)
    for name, text in UPSTREAM.items():
        (upstream / name).write_text(text)
    pin = commit(upstream, "first")
    root.mkdir()
    run("git", "init", "--quiet", "--initial-branch=main", cwd=root)
    (root / "patches").mkdir()
    (root / "patches" / "series").touch()
    (root / "patches" / "README.md").touch()
    (root / "patches" / "pin").write_text(f"{pin}\n")
    (root / ".gitignore").write_text("/build/\n")
    allow = ("-c", "protocol.file.allow=always")
    run("git", *allow, "submodule", "--quiet", "add", upstream.as_uri(), "llama.cpp", cwd=root)
    commit(root, "root")
    monkeypatch.setenv("TURBO_EVAL_ROOT", str(root))
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(folder / "cache"))
    return Toy(root, upstream, pin)
