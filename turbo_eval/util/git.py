"""git as a function: captured output, one-sentence failures."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem

# A user's own settings (diff.noprefix, commit.gpgsign, hooks, autocrlf …) must not leak into
# patches or commits that have to be the same on every machine.
REPRODUCIBLE: Mapping[str, str] = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "true",
    "LC_ALL": "C",
}

_REPOSITORY_VARIABLES = {
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"),
    *("GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_PREFIX", "GIT_SHALLOW_FILE"),
}


class GitError(EnvironmentProblem):
    """A git command failed; `stderr` holds all it said."""

    def __init__(self, message: str, next_step: str = "", *, stderr: str = "") -> None:
        super().__init__(message, next_step)
        self.stderr = stderr


def git(
    *args: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    reproducible: bool = False,
) -> str:
    """Run git in `cwd` and return its stdout, byte for byte (what isn't UTF-8 as surrogates).

    Args:
        env: added to the environment.
        timeout: seconds.
        reproducible: ignore system and user configuration.

    Raises:
        GitError: git is not installed, failed, or took too long.
    """
    # From inside a hook these would point git at the outer repository.
    full = {
        key: value
        for key, value in os.environ.items()
        if not (key in _REPOSITORY_VARIABLES or (reproducible and key.startswith("GIT_")))
    }
    full["GIT_TERMINAL_PROMPT"] = "0"
    command = ["git"]
    if reproducible:
        full |= REPRODUCIBLE
        # The ownership check reads protected configuration only, which was just switched off.
        command += ["-c", "safe.directory=*", "-c", "core.hooksPath=" + os.devnull]
    full |= env or {}
    command += args
    try:
        done = subprocess.run(
            command, cwd=cwd, env=full, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout
        )
    except FileNotFoundError as error:
        if not cwd.is_dir():
            raise GitError(f"{cwd} does not exist") from error
        raise GitError("git is not installed", "install it, e.g. `apt-get install git`") from error
    except subprocess.TimeoutExpired as error:
        raise GitError(f"`git {args[0]}` gave no answer in {timeout:.0f} s") from error
    # Decoded here, not by subprocess: that would fold CRLF, and a patch is bytes. What isn't
    # UTF-8 must survive the round trip too.
    stdout = done.stdout.decode("utf-8", "surrogateescape")
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace") + stdout
        lines = [line for line in said.splitlines() if line.strip()]
        stated = [line for line in lines if line.startswith(("fatal:", "error:"))]
        reason = (stated or lines[-1:] or [f"exit code {done.returncode}"])[0]
        verb = args[0] if not args[0].startswith("-") else " ".join(args[:3])
        raise GitError(
            f"`git {verb}` failed in {cwd}: {reason}",
            stderr=said,
        )
    return stdout


def working_tree_hash(repo: Path, *, without: Sequence[str] = ()) -> str:
    """Tree hash of a checkout as it lies on disk, uncommitted edits and new files included.

    A copy of the index is used, so that staging is left as it is. Ignored files don't count.

    Args:
        without: files and folders at the top that don't count either.
    """
    index = Path(git("rev-parse", "--git-path", "index", cwd=repo).strip())
    index = index if index.is_absolute() else repo / index
    scratch = index.with_name(f"index.turbo-eval.{os.getpid()}")
    try:
        # With its time: by that git knows which files may have changed within the second of the checkout.
        shutil.copy2(index, scratch)
        env = {"GIT_INDEX_FILE": str(scratch)}
        git("add", "--all", cwd=repo, env=env)
        if without:
            leave_out = ("rm", "-r", "--quiet", "--cached", "--ignore-unmatch", "--", *without)
            git(*leave_out, cwd=repo, env=env)
        return git("write-tree", cwd=repo, env=env).strip()
    finally:
        scratch.unlink(missing_ok=True)
