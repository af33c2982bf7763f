"""Upstream at the pin: which commit it is, and two ways to get it."""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.inputs.download import fetch
from turbo_eval.inputs.package_index import RemoteFile, find_file
from turbo_eval.util import paths
from turbo_eval.util.files import lock, sha256_of, transfer_bar
from turbo_eval.util.git import GitError, git
from turbo_eval.util.project import BESIDE_THE_SOURCES, Project

SUBMODULE = "llama.cpp"
UPSTREAM = "https://github.com/ggml-org/llama.cpp"  # as .gitmodules has it, which a wheel does not hold

# llama-cpp-python's sdist of this version was packed with its git submodules' repositories in it;
# the one of llama.cpp is at our pin. Move both together.
SDIST_REQUIREMENT = "llama-cpp-python==0.3.36"
SDIST_NAME = "llama_cpp_python-0.3.36.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST_SIZE = 76_589_250
SDIST_REPOSITORY = "llama_cpp_python-0.3.36/.git/modules/vendor/llama.cpp/"

# Long enough for a slow handshake, short enough not to be noticed where a firewall drops packets.
PROBE_SECONDS = 8.0


@dataclass(frozen=True)
class SourceState:
    """What the pristine checkout holds. `head` is "" when it isn't filled."""

    pin: str
    head: str
    clean: bool

    @property
    def ready(self) -> bool:
        return self.head == self.pin and self.clean


def pin() -> str:
    """The commit that the patches go on.

    In a checkout what the parent repository's index names for `llama.cpp`; in a project the pin that
    came with this package, or HEAD of the checkout that the project lies in.

    Raises:
        EnvironmentProblem: the checkout has no such gitlink.
        UsageError: the project judges its own checkout, and that is no git checkout.
    """
    project = paths.project()
    if project is not None:
        return _own_head(project) if project.here else shipped_pin()
    root = paths.repo_root()
    entry = git("ls-files", "-s", "--", SUBMODULE, cwd=root).split()
    if len(entry) < 2 or entry[0] != "160000":
        raise EnvironmentProblem(
            f"{root} has no submodule {SUBMODULE} in its index", "clone the repository anew with git"
        )
    return entry[1]


def shipped_pin() -> str:
    """The pin that patches/pin names, where git's index can't be asked.

    Raises:
        EnvironmentProblem: the file is missing or holds no commit id.
    """
    file = paths.patches_dir() / "pin"
    try:
        text = file.read_text().strip()
    except OSError:
        raise EnvironmentProblem(f"{file} is missing", "install turbo-eval anew") from None
    if not re.fullmatch("[0-9a-f]{40}", text):
        raise EnvironmentProblem(f"{file} holds no commit id", "install turbo-eval anew")
    return text


def _own_head(project: Project) -> str:
    try:
        top = Path(git("rev-parse", "--show-toplevel", cwd=project.folder).strip())
        if top.resolve() == project.folder.resolve():
            return git("rev-parse", "--verify", "HEAD", cwd=project.folder).strip()
    except GitError:
        pass
    raise UsageError(
        f'{project.root / "project.toml"} says source = "here", but {project.folder} is not the top of a'
        " git checkout with a commit",
        'commit the sources there with git, or say source = "pinned"',
    )


def own_edits(project: Project) -> bool:
    """Has the checkout that a project lies in edits that aren't committed? What `init` wrote doesn't count.

    Raises:
        UsageError: it is no git checkout.
    """
    _own_head(project)
    beside = [f":(exclude){name}" for name in BESIDE_THE_SOURCES]
    return bool(git("status", "--porcelain", "--", ".", *beside, cwd=project.folder).strip())


def state() -> SourceState:
    """Look at the pristine checkout without touching it."""
    folder = paths.submodule_dir()
    if not (folder / ".git").exists():
        return SourceState(pin(), "", clean=True)
    try:
        head = git("rev-parse", "HEAD", cwd=folder).strip()
    except GitError:  # a clone that was killed before it had a commit
        return SourceState(pin(), "", clean=True)
    return SourceState(pin(), head, clean=not git("status", "--porcelain", cwd=folder).strip())


def ensure_source(*, offline_route: bool = False) -> str:
    """Fill the pristine checkout at the pin; says where it came from: "present", "upstream", "sdist",
    or "here" from the checkout that a project lies in.

    Both routes end in git checking out the pinned commit, whose id is a hash over all content:
    what was checked out is what was pinned, wherever the bytes came from.

    Args:
        offline_route: go straight to the sdist.

    Raises:
        EnvironmentProblem: local changes in the way, or neither route works.
    """
    now = state()
    if now.ready:
        return "present"
    folder = paths.submodule_dir()
    if now.head and not now.clean and _only_missing(folder):  # killed while checking out
        git("checkout", "--quiet", "--force", "--detach", now.head, cwd=folder)
        now = state()
        if now.ready:
            return "present"
    if now.head and not now.clean:
        raise EnvironmentProblem(
            f"{folder} has local changes, and it must stay as upstream made it",
            f"move them to {paths.worktree_dir()}, then run `git -C {SUBMODULE} checkout --force {now.pin}`",
        )
    if now.head and _has_commit(folder, now.pin):
        git("checkout", "--quiet", "--detach", now.pin, cwd=folder)
        return _proven("present")
    project = paths.project()
    if project is not None:
        return _proven(_into_own_repository(project, now.pin, offline_route=offline_route))
    root = paths.repo_root()
    reason = ""
    if not offline_route:
        reason = _from_upstream(root)
        if not reason:
            return _proven("upstream")
    _from_sdist(root, reason)
    return _proven("sdist")


def _only_missing(folder: Path) -> bool:
    """Is every difference a file that isn't there? Nothing is lost by checking out again then."""
    lines = git("status", "--porcelain", cwd=folder).splitlines()
    return all(set(line[:2]) <= {" ", "D"} for line in lines)


def _has_commit(folder: Path, commit: str) -> bool:
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}", cwd=folder)
    except GitError:
        return False
    return True


def _proven(route: str) -> str:
    now = state()
    if now.head != now.pin or not now.clean:
        raise EnvironmentProblem(
            f"{SUBMODULE} is at {now.head or 'no commit'} after the download, the pin is {now.pin}",
            f"remove {paths.submodule_dir()} and {paths.step('source', 'source')} again",
        )
    return route


def _from_upstream(root: Path) -> str:
    """The ordinary way; returns why it did not work, "" if it did."""
    url = git("config", "-f", ".gitmodules", f"submodule.{SUBMODULE}.url", cwd=root).strip()
    if not state().head:
        _remove_wreck(root)
    try:
        git("ls-remote", "--exit-code", url, "HEAD", cwd=root, timeout=PROBE_SECONDS)
        git("submodule", "update", "--init", "--depth", "1", "--", SUBMODULE, cwd=root, timeout=1800)
    except GitError as error:
        return error.message
    return ""


def ensure_sdist() -> Path:
    """The verified sdist in the cache.

    Raises:
        EnvironmentProblem: it can't be downloaded, or is not the pinned file.
    """
    target = paths.cache_dir() / "downloads" / SDIST_NAME
    with lock(target):
        if target.is_file():
            if sha256_of(target) == SDIST_SHA256:
                return target
            target.unlink()
        found = find_file(SDIST_REQUIREMENT, sdist=True)
        # our own pin, not what the index says about itself
        pinned = RemoteFile(SDIST_NAME, found.url, SDIST_SHA256)
        with transfer_bar(SDIST_NAME, SDIST_SIZE) as on_bytes:
            return fetch(pinned, target, on_bytes=on_bytes)


def _into_own_repository(project: Project, commit: str, *, offline_route: bool) -> str:
    """Fill a project's repository: it has no parent whose submodule it could be."""
    folder = paths.submodule_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".git" / "HEAD").is_file():
        git("init", "--quiet", cwd=folder)
    fetch = ("fetch", "--quiet", "--depth", "1")
    route, reason = "here", ""
    if project.here:
        git(*fetch, project.folder.as_uri(), "HEAD", cwd=folder)
    else:
        route = "upstream"
        try:
            if offline_route:
                raise GitError("not asked")
            git("ls-remote", "--exit-code", UPSTREAM, "HEAD", cwd=folder, timeout=PROBE_SECONDS)
            git(*fetch, UPSTREAM, commit, cwd=folder, timeout=1800)
        except GitError as error:
            route, reason = "sdist", "" if offline_route else error.message
    if route == "sdist":
        with _donor(commit, folder / ".git", reason) as donor:
            git(*fetch, donor.as_uri(), commit, cwd=folder)
    git("checkout", "--quiet", "--force", "--detach", commit, cwd=folder)
    return route


@contextmanager
def _donor(commit: str, git_dir: Path, reason: str) -> Iterator[Path]:
    """The repository out of the sdist, unpacked inside `git_dir`: same disk, never seen by git status."""
    try:
        archive = ensure_sdist()
    except EnvironmentProblem as error:
        first = f"upstream did not answer ({reason}), and " if reason else ""
        raise EnvironmentProblem(first + error.message, error.next_step) from error
    with tempfile.TemporaryDirectory(prefix="turbo-eval-source-", dir=git_dir) as scratch:
        donor = Path(scratch) / "llama.cpp.git"
        _unpack_repository(archive, donor)
        if not _has_commit(donor, commit):
            raise EnvironmentProblem(
                f"{SDIST_NAME} carries another commit than the pin {commit}",
                "run `git submodule update --init` where upstream can be reached",
            )
        yield donor


def _from_sdist(root: Path, reason: str) -> None:
    commit = pin()
    git_dir = Path(git("rev-parse", "--absolute-git-dir", cwd=root).strip())
    with _donor(commit, git_dir, reason) as donor:
        url = git("config", "-f", ".gitmodules", f"submodule.{SUBMODULE}.url", cwd=root).strip()
        _remove_wreck(root)
        git("submodule", "init", "--", SUBMODULE, cwd=root)
        allow = ("-c", "protocol.file.allow=always", "-c", f"submodule.{SUBMODULE}.url={donor.as_uri()}")
        modules = _modules(root)
        if modules.is_dir():  # a clone of another commit: it asks its own remote, and need not
            git(*allow, "fetch", "--quiet", "--depth", "1", donor.as_uri(), commit, cwd=modules)
        git(*allow, "submodule", "update", "--depth", "1", "--", SUBMODULE, cwd=root)
        git("remote", "set-url", "origin", url, cwd=paths.submodule_dir())


def _modules(root: Path) -> Path:
    """Where git keeps the submodule's repository."""
    git_dir = Path(git("rev-parse", "--absolute-git-dir", cwd=root).strip())
    return git_dir / "modules" / SUBMODULE


def _remove_wreck(root: Path) -> None:
    """Clear what a clone that failed or was killed left behind: it has no commit to lose."""
    modules = _modules(root)
    try:
        git("rev-parse", "--verify", "--quiet", "HEAD", cwd=root, env={"GIT_DIR": str(modules)})
    except GitError:
        shutil.rmtree(modules, ignore_errors=True)
        (paths.submodule_dir() / ".git").unlink(missing_ok=True)


def _unpack_repository(archive: Path, donor: Path) -> None:
    """Objects and refs only: no hooks, no configuration of whoever packed it."""
    keep = ("objects/", "refs/", "HEAD", "packed-refs", "shallow")
    donor.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.startswith(SDIST_REPOSITORY) or not member.isfile():
                continue
            inside = member.name.removeprefix(SDIST_REPOSITORY)
            if not inside.startswith(keep):
                continue
            data = tar.extractfile(member)
            target = (donor / inside).resolve()
            if data is None or not target.is_relative_to(donor.resolve()):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                shutil.copyfileobj(data, stream)
    for folder in ("objects", "refs"):
        (donor / folder).mkdir(exist_ok=True)
    # Fetching by id must be allowed: the tips that the packer's refs name are not the pin alone.
    (donor / "config").write_text(
        "[core]\n\trepositoryformatversion = 0\n\tbare = true\n"
        "[uploadpack]\n\tallowAnySHA1InWant = true\n\tallowReachableSHA1InWant = true\n"
    )
