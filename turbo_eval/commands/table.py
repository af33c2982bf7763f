"""turbo-eval table: the comparison table of what is on record."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from turbo_eval.analysis import table as tables
from turbo_eval.analysis.staleness import stale
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.commands import options as o
from turbo_eval.errors import IncompleteError
from turbo_eval.formats.cache_types import parse_pair
from turbo_eval.records.pairing import MARGIN
from turbo_eval.records.store import read_all, warn_once
from turbo_eval.util.paths import results_dir


class Format(StrEnum):
    """Output formats."""

    rich = "rich"
    markdown = "markdown"
    csv = "csv"
    json = "json"


class Matrix(StrEnum):
    """Figures that --matrix lays out."""

    ppl = "ppl"
    delta = "delta"
    kld = "kld"


def register(app: typer.Typer) -> None:
    app.command(
        help="""Compare what is on record: K × V with ΔPPL, error bars, bits and sizes.

          turbo-eval table

          turbo-eval table --matrix kld

          turbo-eval table results/my-machine --format markdown > table.md
        """
    )(table)


def table(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Record files or folders (default: results/).")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.rich,
    against: o.Against = None,
    margin: o.Margin = MARGIN,
    matrix: Annotated[Matrix | None, typer.Option(help="Print one figure as K × V.")] = None,
) -> None:
    records = read_all(results or [results_dir()])
    if not records:
        raise IncompleteError("there are no records", "run `turbo-eval sweep configs/demo.toml` first")
    for sentence in stale(records):
        warn_once(sentence)
    rows = summarize(records, parse_pair(against) if against else None, margin=margin)
    if matrix is not None:
        names = {Matrix.ppl: "PPL", Matrix.delta: "ΔPPL %", Matrix.kld: "KLD"}
        print("\n".join(tables.render_matrix(group, names[matrix]) for _, group in by_setting(rows)))
    elif form is Format.rich:
        console = Console()
        for _, group in by_setting(rows):
            console.print(tables.render_rich(group, console.width))
    elif form is Format.markdown:
        print("\n".join(tables.render_markdown(group) for _, group in by_setting(rows)), end="")
    elif form is Format.csv:
        print(tables.render_csv(rows), end="")
    else:
        print(tables.render_json(rows), end="")
