"""turbo-eval anchor bias|effect: the tables and plots of docs/explanation/why-symmetric-turbo-failed.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from turbo_eval.anchor import effect as effects
from turbo_eval.anchor import kbias
from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.inputs.models import resolve_model
from turbo_eval.records.store import read_all
from turbo_eval.util import numbers as n
from turbo_eval.util.files import writing
from turbo_eval.util.paths import results_dir

Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the plot there (PNG, SVG, PDF).", show_default=False)
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        help="""What the K anchor is about and what it does.

          turbo-eval anchor bias qwen2.5-coder-1.5b --out bias.png

          turbo-eval anchor effect results/my-machine --out effects.png
        """,
    )
    group.command(
        help="""The K projection bias by layer and RoPE pair, and what an anchor takes of it.

          turbo-eval anchor bias qwen2.5-coder-1.5b --ctx 8192 --out bias.png
        """
    )(bias)
    group.command(
        help="""Perplexity and KL divergence by pair from the records, anchor off and on.

          turbo-eval anchor effect results/my-machine --out effects.png
        """
    )(effect)
    app.add_typer(group, name="anchor")


def bias(
    model: Annotated[list[str], typer.Argument(help="Models by name or path.")],
    ctx: Annotated[
        int,
        typer.Option(
            parser=n.option("--ctx", n.TOKENS),
            metavar="N",
            help="Context in tokens, for the line in the plot.",
        ),
    ] = 512,
    out: Out = None,
) -> None:
    print("turbo-eval: `turbo-eval inspect MODEL` shows the bias and what else decides.", file=sys.stderr)
    biases = [kbias.read_kbias(resolve_model(name).path) for name in model]
    for found in biases:
        print(f"{found.name}\n\n{kbias.table(found)}\n")
    if out:
        _save(kbias.plot(biases, ctx), out)


def effect(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Record files or folders (default: results/).")
    ] = None,
    on: Annotated[str, typer.Option(help="The anchor that counts as on, as asked for.")] = "auto",
    out: Out = None,
) -> None:
    found = effects.effects(read_all(results or [results_dir()]), on)
    if not found:
        raise IncompleteError(
            "there are no KL-divergence records", 'run a sweep with metrics = ["kld"] and both anchor states'
        )
    print(effects.table(found))
    if out:
        _save(effects.plot(found), out)


def _save(figure: object, out: Path) -> None:
    assert isinstance(figure, Figure)
    if out.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise UsageError(
            f"{out.name} is no kind of picture that can be written", "end it in .png, .svg or .pdf"
        )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130, metadata={"Software": None} if out.suffix == ".png" else None)
    print(out)
