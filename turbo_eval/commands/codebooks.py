"""`turbo-eval codebooks`: the frozen tables, their error, and how they come about."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.errors import RegressionError
from turbo_eval.formats.cache_types import BOOKS
from turbo_eval.formats.codebooks import derive as derive_codebook
from turbo_eval.formats.codebooks import encode, gaussians, mse


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("codebooks")(codebooks)


def codebooks(
    derive: Annotated[
        bool, typer.Option("--derive", help="Derive all from evenly spaced levels again (a minute or two).")
    ] = False,
) -> None:
    """Codebooks of our types, their MSE on unit Gaussians and the limits they stand against.

    [bold]Example[/bold]  turbo-eval codebooks --derive
    """

    table = Table("type", "bpv", "magnitudes", "MSE (2^20 unit Gaussians)", "rate-distortion limit")
    if derive:
        table.add_column("derived")
    x = gaussians(2**20, seed=7, octave=False)
    moved = []
    for book in BOOKS.values():
        levels = np.array(book.magnitudes, dtype=np.float64)
        row = [
            book.name,
            f"{book.bits}",
            " ".join(map(str, book.magnitudes)),
            f"{mse(x, encode(x, levels, book.rms1)):.5f}",
            f"{4**-book.bits:.5f}",
        ]
        if derive:
            derived = derive_codebook(book)
            row.append(" ".join(map(str, derived)))
            if any(
                abs(a / derived[-1] - b / levels[-1]) > 0.02 for a, b in zip(derived, levels, strict=True)
            ):
                moved.append(book.name)
        table.add_row(*row)
    Console().print(table)
    if moved:
        raise RegressionError(
            f"the derivation of {', '.join(moved)} no longer gives the frozen codebook",
            "compare turbo_eval/formats/cache_types.py with the encoder in"
            " build/src/ggml/src/ggml-turbo-impl.h",
        )
