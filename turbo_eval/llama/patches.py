"""The patch series: folder ⇄ commits in a worktree, the same bytes on every machine.

`patches/series` names the files in order. They are applied to the pin in a worktree of the
submodule (build/src), which leaves the submodule itself as upstream made it. Author, dates and
messages come from the patches and the committer is fixed, so a series has one commit id.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import EnvironmentProblem, RegressionError, UsageError
from turbo_eval.llama import source
from turbo_eval.llama.worktree import am, checkout, export, in_the_middle, is_worktree, scratch_worktree
from turbo_eval.util import paths
from turbo_eval.util.git import GitError, git, working_tree_hash

BESIDE = {"series", "pin", "README.md"}


@dataclass(frozen=True)
class SeriesState:
    """What `patches status` shows. Commit and tree ids are hex; "" where there is none."""

    pin: str
    patches: tuple[str, ...]
    series_sha256: str
    worktree: Path
    head: str
    tree: str
    applied: bool  # the worktree's commit is this series on this pin
    dirty: bool  # uncommitted edits, or commits that the series doesn't hold
    stopped: bool  # an `am` or `rebase` waits for a decision

    def summary(self) -> str:
        """One line."""
        if not self.head:
            return "not applied"
        if self.stopped:
            return "stopped in the middle of applying: a conflict waits for a decision"
        if self.dirty:  # a commit of one's own is no other series
            return f"{'applied, with' if self.applied else 'there are'} edits the series does not hold"
        return "applied" if self.applied else "another series or pin is applied"


def read_series(folder: Path | None = None) -> list[Path]:
    """The patch files in order; blank lines and `#` comments are skipped.

    Raises:
        UsageError: a listed file is missing, or listed twice.
    """
    folder = folder or paths.patches_dir()
    names = [line.split("#")[0].strip() for line in (folder / "series").read_text().splitlines()]
    names = [name for name in names if name]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{folder / 'series'} lists {name} twice", "delete one of the lines")
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder / 'series'} lists {name}, which is not there",
                "restore the file, or run `turbo-eval patches refresh` to write the series anew",
            )
    return [folder / name for name in names]


def series_sha256(folder: Path | None = None) -> str:
    """One hash over names and contents, in order."""
    digest = hashlib.sha256()
    for patch in read_series(folder):
        digest.update(patch.name.encode() + b"\0" + hashlib.sha256(patch.read_bytes()).digest())
    return digest.hexdigest()


def status() -> SeriesState:
    """Look, change nothing."""
    worktree, pin = paths.worktree_dir(), source.pin()
    series = read_series()
    digest = series_sha256()
    if not is_worktree(worktree, paths.submodule_dir()):
        names = tuple(patch.name for patch in series)
        return SeriesState(pin, names, digest, worktree, "", "", applied=False, dirty=False, stopped=False)
    head = git("rev-parse", "HEAD", cwd=worktree).strip()
    tree = git("rev-parse", "HEAD^{tree}", cwd=worktree).strip()
    last = _read_mark()
    edited = bool(git("status", "--porcelain", cwd=worktree).strip())
    return SeriesState(
        pin=pin,
        patches=tuple(patch.name for patch in series),
        series_sha256=digest,
        worktree=worktree,
        head=head,
        tree=working_tree_hash(worktree) if edited else tree,
        applied=last == {"pin": pin, "series": digest, "commit": last.get("commit", ""), "tree": tree},
        dirty=edited or head not in (last.get("commit"), pin),
        stopped=in_the_middle(worktree),
    )


def apply(*, force: bool = False) -> SeriesState:
    """Bring build/src to pin + series. Files that don't change keep their times, for incremental builds.

    Args:
        force: throw away edits and commits in build/src that the series does not hold.

    Raises:
        UsageError: such edits are there; or a patch does not apply (the sentence says what to do).
        EnvironmentProblem: the submodule isn't filled.
    """
    _require_source()
    worktree, pin = paths.worktree_dir(), source.pin()
    now = status()
    if now.head and not force:
        if now.stopped:
            raise UsageError(
                f"{worktree} is in the middle of a `git am` or rebase",
                "finish it there and run `turbo-eval patches refresh`, or drop it with "
                "`turbo-eval patches apply --force`",
            )
        if now.dirty:
            raise UsageError(
                f"{worktree} has edits that the series does not hold",
                "keep them with `git commit` there and `turbo-eval patches refresh`, or drop them with "
                "`turbo-eval patches apply --force`",
            )
    if now.applied and not now.dirty and not now.stopped:
        return now
    series = read_series()
    with scratch_worktree(paths.submodule_dir(), pin) as scratch:
        failed = am(scratch, series)
        commit = git("rev-parse", "HEAD", cwd=scratch).strip()
        if failed is None:
            checkout(paths.submodule_dir(), worktree, commit)
    if failed is not None and paths.project() is not None:
        raise UsageError(
            f"{failed.patch.name} does not apply to {pin[:12]} ({failed.reason})",
            f"bring the tree closer to upstream's {source.shipped_pin()[:12]}, which the series is made for,"
            " or build it with --no-patches",
        )
    if failed is not None:
        # once more where the user can look at it and resolve it
        checkout(paths.submodule_dir(), worktree, pin)
        conflict = am(worktree, series, three_way=True)
        if conflict is not None:
            raise UsageError(_steps(conflict.patch, worktree), "")
        raise UsageError(
            f"{failed.patch.name} only applies to {pin[:12]} with a three-way merge",
            f"look at the result in {worktree} and run `turbo-eval patches refresh`",
        )
    _write_mark(pin, commit)
    return status()


def refresh() -> list[str]:
    """Write the commits of build/src above the pin out as the series; returns what changed.

    Files are named after the subject, without numbers, so that reordering touches `series` alone.

    Raises:
        UsageError: uncommitted edits, fixup commits, merges, two commits of one subject, or none at all.
    """
    _require_clone()
    _require_source()
    worktree, pin, folder = paths.worktree_dir(), source.pin(), paths.patches_dir()
    if not is_worktree(worktree, paths.submodule_dir()):
        raise UsageError(f"{worktree} is not there", "run `turbo-eval patches apply`")
    if in_the_middle(worktree):
        raise UsageError(f"{worktree} is in the middle of a `git am` or rebase", "finish it there first")
    if git("status", "--porcelain", cwd=worktree).strip():
        raise UsageError(
            f"{worktree} has uncommitted edits",
            "commit them there, e.g. `git commit --fixup <patch's commit>` and "
            f"`git rebase --autosquash {pin[:12]}`",
        )
    exported = export(worktree, pin)
    if not exported and read_series():
        raise UsageError(
            f"{worktree} has no commits above the pin, which would delete the whole series",
            "run `turbo-eval patches apply`, or check out the commits that are to be exported",
        )
    changes: list[str] = []
    for name, content in exported.items():
        target = folder / name
        old = target.read_bytes() if target.is_file() else None
        if old != content:
            target.write_bytes(content)
            changes.append(f"{'new' if old is None else 'changed'}: {name}")
    for stale in sorted(folder.glob("*.patch")):
        if stale.name not in exported:
            stale.unlink()
            changes.append(f"deleted: {stale.name}")
    listing = "".join(f"{name}\n" for name in exported)
    if (folder / "series").read_text() != listing:
        (folder / "series").write_text(listing)
        changes.append("changed: series")
    if _read_pin(folder) != pin:
        (folder / "pin").write_text(f"{pin}\n")
        changes.append("changed: pin")
    # The commits were made by whoever edits; the ones that count are made from the files.
    with scratch_worktree(paths.submodule_dir(), pin) as scratch:
        failed = am(scratch, read_series())
        if failed is not None:
            raise RegressionError(
                f"{failed.patch.name} was written, but does not apply again",
                "run `turbo-eval patches check` and look at that commit for mixed line ends",
            )
        if export(scratch, pin) != exported:
            raise RegressionError(
                "the series was written, but applied again it exports differently",
                "run `turbo-eval patches check`, which says where",
            )
        commit = git("rev-parse", "HEAD", cwd=scratch).strip()
    checkout(paths.submodule_dir(), worktree, commit)
    _write_mark(pin, commit)
    return changes


def check() -> list[str]:
    """Everything that is wrong with the series, one sentence each; empty when it is sound.

    Needs git and the filled submodule, no compiler: series = folder, every patch explained in
    patches/README.md, applies to the pin with no fuzz, comes out again byte for byte, submodule
    pristine.
    """
    _require_clone()
    _require_source()
    folder, pin = paths.patches_dir(), source.pin()
    problems: list[str] = []
    if _read_pin(folder) != pin:
        problems.append(
            f"patches/pin says {_read_pin(folder) or 'nothing'}, llama.cpp is pinned to {pin}; "
            "run `turbo-eval patches apply` and `turbo-eval patches refresh`."
        )
    try:
        series = read_series()
    except UsageError as error:
        return [*problems, error.sentence()]
    listed = {patch.name for patch in series}
    for entry in sorted(folder.iterdir()):
        if entry.name not in listed | BESIDE:
            problems.append(
                f"patches/{entry.name} is an orphan: `series` does not list it; "
                "add it there in its place or delete the file."
            )
    readme = folder / "README.md"
    explained = readme.read_text() if readme.is_file() else ""
    problems += [
        f"patches/README.md does not say why {patch.name} exists and when it can go."
        for patch in series
        if patch.name not in explained
    ]
    with scratch_worktree(paths.submodule_dir(), pin) as scratch:
        failed = am(scratch, series)
        if failed is not None:
            problems.append(
                f"patches/{failed.patch.name} does not apply to {pin[:12]} ({failed.reason}): it or one "
                "before it was edited by hand; run `turbo-eval patches apply`, resolve, and "
                "`turbo-eval patches refresh`."
            )
            return problems
        again = export(scratch, pin, strict=False)
    for patch in series:
        was, new = patch.read_bytes(), again.pop(patch.name, None)
        if new is None:
            problems.append(
                f"patches/{patch.name} is not named after its subject; run `turbo-eval patches refresh`."
            )
        elif was != new:
            problems.append(
                f"patches/{patch.name} is not what git exports from it ({_first_difference(was, new)}); "
                "run `turbo-eval patches apply` and `turbo-eval patches refresh`."
            )
    now = source.state()
    if not now.ready:
        problems.append(
            f"llama.cpp is not pristine at the pin {pin[:12]}; edits belong into {paths.worktree_dir()}."
        )
    return problems


def rebase(revision: str) -> SeriesState:
    """Move the pin to `revision` of upstream and the series with it.

    On success the new gitlink is staged and the series refreshed: one commit holds both.

    Raises:
        UsageError: unknown revision, edits in the way, or a conflict (with the steps to take).
    """
    _require_clone()
    apply()
    submodule, worktree, root = paths.submodule_dir(), paths.worktree_dir(), paths.repo_root()
    commit = ""
    for attempt in (False, True):
        try:
            if attempt:
                git("fetch", "--quiet", "--depth", "1", "origin", revision, cwd=submodule, timeout=600)
            name = "FETCH_HEAD" if attempt else revision
            commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", cwd=submodule).strip()
            break
        except GitError as error:
            if attempt:
                raise UsageError(
                    f"upstream has no revision {revision} that can be fetched ({error.message})",
                    "name a full commit id or a tag",
                ) from error
    git("checkout", "--quiet", "--detach", commit, cwd=submodule)
    git("update-index", "--cacheinfo", f"160000,{commit},{source.SUBMODULE}", cwd=root)
    checkout(paths.submodule_dir(), worktree, commit)
    conflict = am(worktree, read_series(), three_way=True)
    if conflict is not None:
        raise UsageError(_steps(conflict.patch, worktree), "")
    refresh()
    return status()


def _steps(patch: Path, worktree: Path) -> str:
    return (
        f"{patch.name} conflicts with {source.pin()[:12]}; three steps: "
        f"(1) in {worktree} edit the files that `git status` lists as unmerged and `git add` them "
        "(`git am --show-current-patch=diff` shows what the patch wanted), "
        "(2) `git am --continue` there, and again for each further conflict, "
        "(3) `turbo-eval patches refresh`, then build and sweep before you commit"
    )


def _require_source() -> None:
    now = source.state()
    if now.head != now.pin:
        what = f"is at {now.head[:12]}, the pin is {now.pin[:12]}" if now.head else "is empty"
        raise EnvironmentProblem(f"{paths.submodule_dir()} {what}", paths.step("source", "source"))


def _require_clone() -> None:
    if paths.project() is not None:
        raise UsageError(
            "the series of an installed turbo-eval stays as it is", "change it in a clone of turbo-eval"
        )


def _read_pin(folder: Path) -> str:
    """The pin as it is written down for packages, which have no gitlink; "" if it isn't."""
    file = folder / "pin"
    return file.read_text().strip() if file.is_file() else ""


def _first_difference(was: bytes, new: bytes) -> str:
    old_lines, new_lines = was.splitlines(), new.splitlines()
    for number, (old, fresh) in enumerate(zip(old_lines, new_lines, strict=False), 1):
        if old != fresh:
            have, want = (text[:60].decode(errors="replace") for text in (old, fresh))
            return f"line {number}: {have!r}, git writes {want!r}"
    if len(old_lines) != len(new_lines):
        return f"{len(old_lines)} lines, git writes {len(new_lines)}"
    return "line ends differ"


def _mark() -> Path:
    return paths.repo_root() / "build" / "applied.json"


def _read_mark() -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in json.loads(_mark().read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_mark(pin: str, commit: str) -> None:
    tree = git("rev-parse", f"{commit}^{{tree}}", cwd=paths.submodule_dir()).strip()
    _mark().parent.mkdir(parents=True, exist_ok=True)
    mark = {"pin": pin, "series": series_sha256(), "commit": commit, "tree": tree}
    _mark().write_text(json.dumps(mark))
