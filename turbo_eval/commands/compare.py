"""turbo-eval compare: do two machines, builds or settings give the same numbers, and if not, why."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from turbo_eval.analysis.compare import compare as compare_sides
from turbo_eval.analysis.compare import read_side, render


class Form(StrEnum):
    """Output formats."""

    rich = "rich"
    markdown = "markdown"
    json = "json"


def register(app: typer.Typer) -> None:
    app.command(
        help="""Compare two sets of records cell by cell: machines, builds, pins, backends, settings.

        A side is a results folder or file, narrowed by @field=value,… (machine, tree, pin, backend,
        anchor, model, metric, k, v, ctx, chunks, ubatch); @… alone means our results/.
        Exit code 0: no cell differs beyond noise; 1: some do; 3: no cell is on both sides.

          turbo-eval compare results/my-machine sent-by-someone/ --format markdown

          turbo-eval compare @anchor=off @anchor=auto

          turbo-eval compare @tree=bin-,k=q8_0 @tree=3f2a,k=q8_0
        """
    )(compare)


def compare(
    a: Annotated[str, typer.Argument(help="Results of side A, e.g. results/m2 or @backend=cpu.")],
    b: Annotated[str, typer.Argument(help="Results of side B.")],
    form: Annotated[Form, typer.Option("--format", help="How to print it.")] = Form.rich,
) -> None:
    result = compare_sides(read_side(a), read_side(b))
    if form is Form.markdown:
        print(render.render_markdown(result), end="")
    elif form is Form.json:
        print(render.render_json(result), end="")
    else:
        Console().print(render.render_rich(result))
    if result.differing:
        raise typer.Exit(1)
