"""turbo-eval probe: two configurations over the same tokens, tensor by tensor."""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.commands import options as o
from turbo_eval.formats.cache_types import BOOKS
from turbo_eval.inputs.corpora import default_name, resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.probe import Setup, compare, render, take


class Form(StrEnum):
    """Output formats."""

    markdown = "markdown"
    json = "json"


JUDGED = "k={0},v={0}".format(next(iter(BOOKS)))


def register(app: typer.Typer) -> None:
    app.command(
        help="""Find the first layer and tensor where a cache goes wrong.

        Runs the same tokens through two configurations and follows Q, K and V of each layer through
        rotation, anchor, cache and attention. Each step is judged by its own input: a layer is not
        blamed for the errors of those before it. Exit code 0: every step follows; 1: one doesn't, or
        a type costs far more than it should; it is named.

          turbo-eval probe qwen2.5-coder-0.5b --a k=f16,v=f16 --b k=turbo4,v=turbo3,anchor=off

          turbo-eval probe my.gguf --b k=turbo3,v=turbo3,recent=128

          turbo-eval probe my.gguf --a backend=cpu,k=turbo4,v=turbo4 --b backend=cuda,k=turbo4,v=turbo4
        """
    )(probe)


SETTINGS = "backend=,k=,v=,profile=,anchor=,recent=,first=,bin=,env.NAME="


def probe(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    a: Annotated[str, typer.Option("--a", help=SETTINGS)] = "k=f16,v=f16",
    b: Annotated[str, typer.Option("--b", help="The configuration to judge, likewise.")] = JUDGED,
    corpus: o.Corpus = None,
    tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens to evaluate, in one batch.")] = 96,
    threads: o.Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot over layers (PNG, SVG).")] = None,
    form: Annotated[Form, typer.Option("--format", help="How to print it.")] = Form.markdown,
    keep: Annotated[Path | None, typer.Option(help="Keep the tensors (GGUF) and logs here.")] = None,
) -> None:
    setups = [Setup.parse(a), Setup.parse(b)]
    gguf, text = resolve_model(model).path, resolve_corpus(corpus or default_name()).path
    with tempfile.TemporaryDirectory(prefix="turbo-eval-probe-") as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        sides = [
            take(
                setup,
                model=gguf,
                text=text,
                tokens=tokens,
                threads=threads or os.cpu_count() or 1,
                folder=folder,
                name=name,
            )
            for name, setup in zip("ab", setups, strict=True)
        ]
        result = compare(*sides)
    if plot:
        render.plot(result, plot)
    print(render.render_json(result) if form is Form.json else render.render_markdown(result), end="")
    if result.faulty:
        raise typer.Exit(1)
