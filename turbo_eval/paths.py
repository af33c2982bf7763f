"""Where things lie. Every path of the project is named here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from turbo_eval.errors import EnvironmentProblem

_ROOT_MARK = Path("patches") / "series"


def repo_root() -> Path:
    """The checkout this package works on.

    `TURBO_EVAL_ROOT` if set, else the checkout the package was installed from (editable),
    else the nearest folder at or above the current one that holds `patches/series`.

    Raises:
        EnvironmentProblem: none of these is a turbo-eval checkout.
    """
    override = os.environ.get("TURBO_EVAL_ROOT")
    if override:
        root = Path(override).expanduser().resolve()
        if not (root / _ROOT_MARK).is_file():
            raise EnvironmentProblem(
                f"TURBO_EVAL_ROOT={override} is no turbo-eval checkout: it has no {_ROOT_MARK}",
                "unset it or point it at a clone",
            )
        return root
    here = Path.cwd()
    for candidate in (Path(__file__).resolve().parent.parent, here, *here.parents):
        if (candidate / _ROOT_MARK).is_file():
            return candidate
    raise EnvironmentProblem(
        f"no turbo-eval checkout at or above {here}", "run from a clone or set TURBO_EVAL_ROOT"
    )


def cache_dir() -> Path:
    """Downloads, models, corpora and their hashes; `TURBO_EVAL_CACHE` overrides. May not exist yet."""
    override = os.environ.get("TURBO_EVAL_CACHE")
    if override:
        return Path(override).expanduser().resolve()
    return Path(platformdirs.user_cache_dir("turbo-eval", appauthor=False))


def submodule_dir() -> Path:
    """The pristine upstream checkout."""
    return repo_root() / "llama.cpp"


def patches_dir() -> Path:
    """The series: one file a patch, `series`, README.md."""
    return repo_root() / "patches"


def configs_dir() -> Path:
    """Sweeps, gates, model and corpus registries (TOML)."""
    return repo_root() / "configs"


def results_dir() -> Path:
    """Records, by machine; `TURBO_EVAL_RESULTS` overrides."""
    override = os.environ.get("TURBO_EVAL_RESULTS")
    return Path(override).expanduser().resolve() if override else repo_root() / "results"


def worktree_dir() -> Path:
    """The worktree of the submodule that carries the applied series."""
    return repo_root() / "build" / "src"


def build_dir(backend: str) -> Path:
    """CMake's build folder of one backend; binaries and libraries lie in its `bin/`."""
    return repo_root() / "build" / backend
