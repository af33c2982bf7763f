"""Cells on more than one device: Dask carries JSON between a sweep and its workers.

    sweep → placement → executor ⇄ cluster (dask client) ⇄ scheduler ⇄ entry.call → worker → record

Nothing here is imported unless `--jobs`, `--scheduler` or `turbo-eval worker` asks for it.
"""

from __future__ import annotations

from importlib.util import find_spec

from turbo_eval.errors import EnvironmentProblem


def require_distributed() -> None:
    """Say how to get Dask where it is missing.

    Raises:
        EnvironmentProblem: `distributed` is not installed.
    """
    if find_spec("distributed") is None:
        raise EnvironmentProblem(
            "more than one device needs Dask, which is not installed",
            "run `pip install 'turbo-eval[scale]'` (in a clone: `.venv/bin/pip install -e '.[scale]'`)",
        )
