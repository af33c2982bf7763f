"""What is bisected: commits of llama.cpp, or of this repository with the llama.cpp each one makes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import TurboEvalError, UsageError
from turbo_eval.llama import patches, source
from turbo_eval.llama.worktree import am, checkout
from turbo_eval.util import paths
from turbo_eval.util.git import GitError, git


def bisect_dir() -> Path:
    """Worktrees, builds and records of bisections; safe to delete."""
    return paths.repo_root() / "build" / "bisect"


class UntestableError(TurboEvalError):
    """This revision gives no llama.cpp that can be built: it is skipped."""


@dataclass(frozen=True)
class History:
    """A repository to bisect in.

    Attributes:
        repo: where the revisions are commits.
        llama: repository of llama.cpp that the trees are checked out from.
        ours: the revisions are of turbo-eval; each one's llama.cpp is its pin under its patches.
    """

    repo: Path
    llama: Path
    ours: bool

    def commit(self, revision: str) -> str:
        """Full id.

        Raises:
            UsageError: there is no such revision.
        """
        try:
            return git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", cwd=self.repo).strip()
        except GitError:
            raise UsageError(
                f"{self.repo} has no revision {revision}", "name a commit, tag or branch of it"
            ) from None

    def subject(self, commit: str) -> str:
        """ "0123456789ab subject"."""
        return git("log", "-1", "--format=%h %s", "--abbrev=12", commit, cwd=self.repo).strip()

    def between(self, good: str, bad: str) -> list[str]:
        """Commits that may be the first bad one, oldest first.

        Raises:
            UsageError: bad doesn't come after good.
        """
        listing = git("rev-list", "--reverse", f"{good}..{bad}", cwd=self.repo).split()
        if not listing or git("merge-base", good, bad, cwd=self.repo).strip() != good:
            raise UsageError(
                f"{bad[:12]} does not come after {good[:12]}", "--good must be an ancestor of --bad"
            )
        return listing

    def llama_commit(self, commit: str) -> str:
        """The commit of `llama` that a revision builds.

        Raises:
            UntestableError: its patches do not apply to its pin, or the pin is not here.
        """
        if not self.ours:
            return commit
        pin = git("rev-parse", f"{commit}:{source.SUBMODULE}", cwd=self.repo).strip()
        scratch, series = bisect_dir() / "apply", bisect_dir() / "patches"
        try:
            checkout(self.llama, scratch, pin)
            shutil.rmtree(series, ignore_errors=True)
            series.mkdir(parents=True)
            listing = git("ls-tree", "-z", "--name-only", f"{commit}:patches", cwd=self.repo)
            for name in filter(None, listing.split("\0")):
                text = git("show", f"{commit}:patches/{name}", cwd=self.repo)
                (series / name).write_bytes(text.encode("utf-8", "surrogateescape"))
            failed = am(scratch, patches.read_series(series))
        except (GitError, UsageError) as error:
            raise UntestableError(error.message) from None
        if failed is not None:
            raise UntestableError(f"{failed.patch.name} does not apply to {pin[:12]}: {failed.reason}")
        return git("rev-parse", "HEAD", cwd=scratch).strip()


def open_history(repo: Path | None, *, series: bool) -> History:
    """The clone `repo`, else the checkout that a project judges, else llama.cpp with the patch series, else
    this repository's own commits.

    Raises:
        UsageError: `repo` is no git repository, or there is none.
    """
    if repo is not None:
        try:
            top = Path(git("rev-parse", "--show-toplevel", cwd=repo.expanduser().resolve()).strip())
        except GitError as error:
            raise UsageError(f"{repo} is no git repository ({error.message})", "name a clone") from None
        return History(top, top, ours=False)
    project = paths.project()
    if project is not None and project.here:
        return History(project.folder, project.folder, ours=False)
    if project is not None and not series:
        raise UsageError(
            "an installed turbo-eval has no commits to bisect", "name a clone with --repo, or --series"
        )
    submodule = paths.submodule_dir()
    return History(submodule if series else paths.repo_root(), submodule, ours=not series)


def series_commits(history: History) -> list[str]:
    """Commit after 0, 1, 2 … patches of the series.

    Raises:
        UsageError: the series does not apply.
    """
    pin = source.pin()
    scratch = bisect_dir() / "apply"
    checkout(history.llama, scratch, pin)
    failed = am(scratch, patches.read_series())
    if failed is not None:
        raise UsageError(
            f"{failed.patch.name} does not apply to {pin[:12]} ({failed.reason})",
            "run `turbo-eval patches check`",
        )
    head = git("rev-parse", "HEAD", cwd=scratch).strip()
    return [pin, *git("rev-list", "--reverse", f"{pin}..{head}", cwd=scratch).split()]


@dataclass
class Search:
    """git's own bisection, in a worktree without files so that nobody's checkout is touched.

    Attributes:
        current: the commit to judge next; "" when it is over.
        first_bad: the answer; "" if skipped commits hide it, then `candidates` holds what is left.
    """

    place: Path
    current: str = ""
    first_bad: str = ""
    candidates: tuple[str, ...] = ()

    def judge(self, verdict: str) -> None:
        """Tell git "good", "bad" or "skip" about the current commit."""
        try:
            said = git("bisect", verdict, self.current, cwd=self.place)
        except GitError as error:
            left = re.findall(r"^([0-9a-f]{40})$", error.stderr, re.M)
            if "only 'skip'ped commits left" not in error.stderr or not left:
                raise
            self.current, self.candidates = "", tuple(left)
            return
        self.read(said)

    def read(self, said: str) -> None:
        """Take the next commit or the answer from what git said."""
        found = re.search(r"^([0-9a-f]{40}) is the first bad commit", said, re.M)
        if found:
            self.current, self.first_bad = "", found[1]
        else:
            self.current = git("rev-parse", "BISECT_HEAD", cwd=self.place).strip()


@contextmanager
def search(history: History, good: str, bad: str) -> Iterator[Search]:
    """Start a bisection; cleaned away afterwards, whatever happens."""
    place = bisect_dir() / "search"
    repo = history.repo
    _remove(repo, place)
    place.parent.mkdir(parents=True, exist_ok=True)
    git("worktree", "add", "--quiet", "--force", "--no-checkout", "--detach", str(place), bad, cwd=repo)
    try:
        state = Search(place)
        state.read(git("bisect", "start", "--no-checkout", bad, good, cwd=place))
        yield state
    finally:
        _remove(repo, place)


def _remove(repo: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    git("worktree", "prune", cwd=repo)
