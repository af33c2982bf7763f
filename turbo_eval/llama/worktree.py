"""Worktrees of llama.cpp's repository, patches applied in them and commits exported from them: the same bytes
on every machine."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.util.git import GitError, git

COMMITTER = {
    "GIT_COMMITTER_NAME": "turbo-eval",
    "GIT_COMMITTER_EMAIL": "turbo-eval@localhost",
}
# Subjects as they are, without "[PATCH]" put on and taken off: git's cleaning eats "[tag] :".
# Scissors and CR handling must not eat content either.
AM = (
    *("am", "--quiet", "--committer-date-is-author-date", "--keep", "--keep-cr"),
    *("--no-scissors", "--whitespace=nowarn", "--no-gpg-sign"),
)


EXPORT = (
    *("format-patch", "--stdout", "--zero-commit", "--full-index", "--binary", "--no-signature"),
    *("--no-stat", "--keep-subject", "--no-renames", "--diff-algorithm=myers", "--unified=3"),
)


@dataclass(frozen=True)
class Conflict:
    """The first patch that does not apply, and git's reason."""

    patch: Path
    reason: str


def is_worktree(folder: Path, repo: Path) -> bool:
    """Is `folder` a worktree's top? Repaired if it and `repo` were moved and no longer find each other."""
    if not (folder / ".git").is_file():
        return False
    for last in (False, True):
        try:
            top = git("rev-parse", "--show-toplevel", cwd=folder).strip()
            return Path(top).resolve() == folder.resolve()
        except GitError:
            # The clone was moved; there may be edits in it.
            if last or not repo.is_dir():
                return False
            try:
                git("worktree", "repair", str(folder), cwd=repo)
            except GitError:
                return False
    return False


def in_the_middle(worktree: Path) -> bool:
    """Does an `am` or a rebase wait there for a decision?"""
    return any(
        (worktree / git("rev-parse", "--git-path", name, cwd=worktree).strip()).exists()
        for name in ("rebase-apply", "rebase-merge")
    )


def checkout(repo: Path, worktree: Path, commit: str) -> None:
    """Check `commit` of `repo` out in `worktree`, whatever state that is in; make it if it's not there.
    Files that don't change keep their times.

    Raises:
        EnvironmentProblem: the folder holds something else than llama.cpp.
    """
    if is_worktree(worktree, repo) and _common(worktree) == _common(repo):
        for verb in ("am", "rebase"):
            if in_the_middle(worktree):
                try:
                    git(verb, "--abort", cwd=worktree)
                except GitError:
                    git(verb, "--quit", cwd=worktree)
        git("checkout", "--quiet", "--force", "--detach", commit, cwd=worktree)
        git("clean", "--quiet", "-d", "--force", cwd=worktree)
        return
    if worktree.exists():
        if any(worktree.iterdir()) and not (worktree / "CMakeLists.txt").is_file():
            raise EnvironmentProblem(f"{worktree} holds something else", "move it away")
        shutil.rmtree(worktree)
    worktree.parent.mkdir(parents=True, exist_ok=True)
    git("worktree", "prune", cwd=repo)
    git("worktree", "add", "--quiet", "--force", "--detach", str(worktree), commit, cwd=repo)


def _common(folder: Path) -> Path:
    """The repository that a worktree, or a checkout, belongs to."""
    common = Path(git("rev-parse", "--git-common-dir", cwd=folder).strip())
    return (common if common.is_absolute() else folder / common).resolve()


@contextmanager
def scratch_worktree(repo: Path, commit: str) -> Iterator[Path]:
    """`commit` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="turbo-eval-patches-") as folder:
        scratch = Path(folder) / "src"
        git("worktree", "prune", cwd=repo)
        git("worktree", "add", "--quiet", "--detach", str(scratch), commit, cwd=repo)
        try:
            yield scratch
        finally:
            git("worktree", "remove", "--force", str(scratch), cwd=repo)


def am(worktree: Path, series: Sequence[Path], *, three_way: bool = False) -> Conflict | None:
    """Apply in order, up to the first patch that fails.

    Args:
        three_way: merge, and leave a conflict in the worktree for the user to resolve.
    """
    for index, patch in enumerate(series):
        rest = [str(path) for path in series[index:]] if three_way else [str(patch)]
        options = ["--3way"] if three_way else []
        try:
            git(*AM, *options, "--", *rest, cwd=worktree, env=COMMITTER, reproducible=True)
        except GitError as error:
            lines = [line.strip() for line in error.stderr.splitlines() if "error:" in line]
            reason = lines[0].removeprefix("error: ") if lines else error.message
            return Conflict(series[index + _done_in_this_am(worktree)] if three_way else patch, reason)
        if three_way:
            break
    return None


def _done_in_this_am(worktree: Path) -> int:
    """How many patches of a stopped `am` are in already."""
    place = worktree / git("rev-parse", "--git-path", "rebase-apply/next", cwd=worktree).strip()
    return int(place.read_text()) - 1 if place.is_file() else 0


def export(worktree: Path, base: str, *, strict: bool = True) -> dict[str, bytes]:
    """File name → content of every commit in base..HEAD, oldest first.

    Raises:
        UsageError: (strict) fixups, merges, or two commits of one name.
    """
    listing = git("log", "--reverse", "--format=%H%x09%P%x09%s", f"{base}..HEAD", cwd=worktree)
    exported: dict[str, bytes] = {}
    for line in listing.splitlines():
        commit, parents, subject = line.split("\t", 2)
        if strict and subject.startswith(("fixup!", "squash!", "amend!")):
            raise UsageError(
                f'{commit[:12]} "{subject}" is not folded into its patch',
                f"run `git rebase --autosquash {base[:12]}` in {worktree}",
            )
        if strict and len(parents.split()) != 1:
            raise UsageError(
                f'{commit[:12]} "{subject}" is a merge', "make the history a line with `git rebase`"
            )
        name = file_name(subject)
        if name in exported:
            raise UsageError(f'two commits have the subject "{subject}"', "reword one of them")
        text = git(*EXPORT, "-1", commit, cwd=worktree, reproducible=True)
        exported[name] = text.encode("utf-8", "surrogateescape")
    return exported


def file_name(subject: str) -> str:
    """`"ggml : add turbo3"` → `"ggml-add-turbo3.patch"`."""
    slug = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")
    return f"{slug[:64].rstrip('-') or 'patch'}.patch"
