"""Where things lie. Every path of the project is named here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.util.project import Project, is_project, load

_ROOT_MARK = Path("patches") / "series"
_PACKAGE = Path(__file__).resolve().parents[1]


def project() -> Project | None:
    """The project (see `turbo-eval init`) that `TURBO_EVAL_ROOT` names or that the current folder lies in.

    None in a checkout of turbo-eval, and where there is neither.

    Raises:
        UsageError: its project.toml is wrong.
    """
    override = os.environ.get("TURBO_EVAL_ROOT")
    if override:
        folder = Path(override).expanduser().resolve()
        return load(folder) if is_project(folder) else None
    here = Path.cwd()
    for folder in (here, *here.parents):
        if is_project(folder):
            return load(folder)
        if (folder / _ROOT_MARK).is_file():
            return None
    return None


def checkout() -> Path | None:
    """The clone of turbo-eval to work on, if this is no project.

    `TURBO_EVAL_ROOT` if set, else the checkout the package was installed from (editable),
    else the nearest folder at or above the current one that holds `patches/series`.

    Raises:
        EnvironmentProblem: `TURBO_EVAL_ROOT` is neither checkout nor project.
    """
    override = os.environ.get("TURBO_EVAL_ROOT")
    if override:
        root = Path(override).expanduser().resolve()
        if not (root / _ROOT_MARK).is_file():
            raise EnvironmentProblem(
                f"TURBO_EVAL_ROOT={override} is no turbo-eval checkout: it has no {_ROOT_MARK}",
                "unset it, or point it at a clone or at a folder that `turbo-eval init` set up",
            )
        return root
    here = Path.cwd()
    for candidate in (_PACKAGE.parent, here, *here.parents):
        if (candidate / _ROOT_MARK).is_file():
            return candidate
    return None


def repo_root() -> Path:
    """Where builds and results go: the checkout, or the `turbo-eval` folder of the project.

    Raises:
        EnvironmentProblem: there is neither.
    """
    found = project()
    if found is not None:
        return found.root
    root = checkout()
    if root is None:
        raise EnvironmentProblem(
            f"there is no turbo-eval project at or above {Path.cwd()}",
            "make one with `turbo-eval init DIR` and work in it, or set TURBO_EVAL_ROOT",
        )
    return root


def shipped() -> Path:
    """What came with this package: patches/ and configs/."""
    data = _PACKAGE / "data"
    return data if data.is_dir() else _PACKAGE.parent


def shipped_workflows() -> Path:
    """The workflows for other people's CI: files of this repository's own, packed with the wheel."""
    data = _PACKAGE / "data"
    return data / "workflows" if data.is_dir() else _PACKAGE.parent / ".github" / "workflows"


def step(target: str, command: str) -> str:
    """How to take a step here, to end a sentence: make's target, or our command in a project."""
    return f"run `turbo-eval {command}`" if project() is not None else f"run `make {target}`"


def cache_dir() -> Path:
    """Downloads, models, corpora and their hashes; `TURBO_EVAL_CACHE` overrides. May not exist yet."""
    override = os.environ.get("TURBO_EVAL_CACHE")
    if override:
        return Path(override).expanduser().resolve()
    return Path(platformdirs.user_cache_dir("turbo-eval", appauthor=False))


def submodule_dir() -> Path:
    """The pristine checkout under the patches: the submodule, in a project a repository of its own."""
    return repo_root() / ("llama.cpp" if project() is None else "build/llama.cpp")


def patches_dir() -> Path:
    """The series: one file a patch, `series`, `pin`, README.md."""
    return _own_or_shipped() / "patches"


def configs_dir() -> Path:
    """Sweeps, gates, model and corpus registries (TOML)."""
    return _own_or_shipped() / "configs"


def _own_or_shipped() -> Path:
    return shipped() if project() is not None else checkout() or shipped()


def results_dir() -> Path:
    """Records, by machine; `TURBO_EVAL_RESULTS` overrides."""
    override = os.environ.get("TURBO_EVAL_RESULTS")
    return Path(override).expanduser().resolve() if override else repo_root() / "results"


def worktree_dir() -> Path:
    """The worktree of the pristine checkout that carries the applied series."""
    return repo_root() / "build" / "src"


def sources_dir(*, patched: bool = True) -> Path:
    """What is compiled: the worktree with the patches, or without them what lies under it."""
    found = project()
    if patched:
        return worktree_dir()
    return found.folder if found is not None and found.here else submodule_dir()


def build_dir(backend: str) -> Path:
    """CMake's build folder of one backend; binaries and libraries lie in its `bin/`."""
    return repo_root() / "build" / backend
