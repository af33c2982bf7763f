"""`--preload turbo_eval.scale.preload` makes stock Dask processes ours.

    dask scheduler --preload turbo_eval.scale.preload
    dask worker --no-nanny --nthreads 1 --preload turbo_eval.scale.preload tcp://…

For launchers that start Dask's own commands (dask-jobqueue, dask-kubernetes). Options of the worker
come from the environment: TURBO_EVAL_WORKER_BACKEND, _BIN_DIR, _MODELS (a folder), _THREADS.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from turbo_eval.scale import guard


def dask_setup(server: Any) -> None:
    """Called by Dask before the server starts."""
    if not hasattr(server, "plugin_add"):
        guard.protect(server)
        return
    from turbo_eval.scale.worker import Cells, attach, find_device

    def setting(name: str) -> str | None:
        return os.environ.get(f"TURBO_EVAL_WORKER_{name}") or None

    bin_dir, folder, threads = setting("BIN_DIR"), setting("MODELS"), setting("THREADS")
    cells = Cells(
        find_device(setting("BACKEND")),
        bin_dir=Path(bin_dir) if bin_dir else None,
        folders=[Path(folder)] if folder else [],
        threads=int(threads) if threads else None,
    )
    attach(server, cells)
