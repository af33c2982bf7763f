"""`--preload turbo_eval.scale.preload` makes stock Dask processes ours.

    dask scheduler --preload turbo_eval.scale.preload
    dask worker --no-nanny --nthreads 2 --preload turbo_eval.scale.preload tcp://…

For launchers that start Dask's own commands (dask-jobqueue, dask-kubernetes). Options come from the
environment: TURBO_EVAL_WORKER_BACKEND, _BIN_DIR, _MODELS (a folder), _THREADS are the worker's;
TURBO_EVAL_INSECURE=1 is --insecure.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from turbo_eval.errors import TurboEvalError, UsageError
from turbo_eval.scale import guard
from turbo_eval.scale.target import is_loopback


def dask_setup(server: Any) -> None:
    """Called by Dask before the server starts."""
    worker = hasattr(server, "plugin_add")
    try:
        address = server.scheduler.address if worker else server.address
        _require_protection(address)
        if worker:
            _attach(server)
        else:
            guard.protect(server)
    except Exception as error:
        # Dask would log it and go on, without the guard.
        words = error.sentence() if isinstance(error, TurboEvalError) else repr(error)
        print(f"turbo-eval {'worker' if worker else 'scheduler'}: {words}", file=sys.stderr, flush=True)
        os._exit(error.exit_code if isinstance(error, TurboEvalError) else 1)


def _require_protection(address: str) -> None:
    if address.startswith("tls://") or is_loopback(address) or os.environ.get("TURBO_EVAL_INSECURE") == "1":
        return
    raise UsageError(
        f"{address} is not encrypted and reachable from other machines",
        "use TLS, --host 127.0.0.1, or TURBO_EVAL_INSECURE=1 on a network of your own",
    )


def _attach(worker: Any) -> None:
    from turbo_eval.scale.worker.cells import Cells, attach, find_device  # noqa: PLC0415 a scheduler does without

    def setting(name: str) -> str | None:
        return os.environ.get(f"TURBO_EVAL_WORKER_{name}") or None

    bin_dir, folder, threads = setting("BIN_DIR"), setting("MODELS"), setting("THREADS")
    cells = Cells(
        find_device(setting("BACKEND")),
        bin_dir=Path(bin_dir) if bin_dir else None,
        folders=[Path(folder)] if folder else [],
        threads=int(threads) if threads else None,
    )
    attach(worker, cells)
