"""turbo-eval worker: give this machine's device to a scheduler's sweeps."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.commands import options as o
from turbo_eval.errors import EnvironmentProblem
from turbo_eval.scale import require_distributed
from turbo_eval.scale.target import TlsFiles, scheduler_address, security
from turbo_eval.scale.worker.cells import Cells, find_device, serve


def register(app: typer.Typer) -> None:
    app.command(
        help="""Measure cells for sweeps on other machines, one at a time, until the scheduler goes.

        A Dask worker that runs nothing but this package's own measurements. It gets models and texts
        by content, and builds the sweep's tree itself if its checkout has the same patches.

          dask scheduler --scheduler-file s.json --preload turbo_eval.scale.preload

          turbo-eval worker s.json

          CUDA_VISIBLE_DEVICES=1 turbo-eval worker tls://head:8786 --tls-ca ca.pem --tls-cert me.pem \\
              --tls-key me.key
        """
    )(worker)


def worker(
    scheduler: Annotated[str, typer.Argument(help="tcp://host:port, tls://host:port or a scheduler file.")],
    backend: o.Backend = None,
    threads: o.Threads = None,
    bin_dir: o.BinDir = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of models and texts to use by name; may be repeated.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name shown by Dask.", show_default=False)] = None,
    tls_ca: o.TlsCa = None,
    tls_cert: o.TlsCert = None,
    tls_key: o.TlsKey = None,
    insecure: o.Insecure = False,
    patience: o.Patience = 60.0,
) -> None:
    require_distributed()

    address = scheduler_address(scheduler)
    secured = security(address, TlsFiles(tls_ca, tls_cert, tls_key), insecure=insecure)
    cells = Cells(find_device(backend), bin_dir=bin_dir, folders=models or (), threads=threads)
    logging.getLogger("distributed").setLevel(logging.ERROR)
    why = asyncio.run(serve(address, cells, security=secured, name=name, patience=patience))
    print(f"turbo-eval worker: {why}", file=sys.stderr)
    if why != "told to stop":
        raise EnvironmentProblem(f"{why} ({address})", "start the worker again when it is back")
