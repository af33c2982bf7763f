"""turbo-eval calibrate: a calibration file for --kv-anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.anchor import calibrate as calibration
from turbo_eval.commands import options as o
from turbo_eval.inputs.corpora import default_name, resolve_corpus
from turbo_eval.inputs.models import resolve_model


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Prepare",
        help="""Measure Q and K of a model on a text, for the K anchor.

        Without such a file the anchor takes its numbers from the model's weights alone. With it:
        `--kv-anchor FILE` for llama.cpp's tools, `--anchor FILE` for a sweep.

          turbo-eval calibrate qwen2.5-coder-0.5b

          turbo-eval calibrate my.gguf --corpus my.txt --out my.kv-anchor.gguf
        """,
    )(calibrate)


def calibrate(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    corpus: o.Corpus = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: MODEL.kv-anchor.gguf.", show_default=False)
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 512,
    chunks: Annotated[int, typer.Option(help="Chunks to read.")] = 16,
    threads: o.Threads = None,
    backend: o.Backend = None,
    bin_dir: o.BinDir = None,
) -> None:
    build = o.load_build(backend or "cpu", bin_dir)
    build.tool(calibration.TOOL)  # before anything is downloaded
    found = resolve_model(model)
    target = out or Path(f"{found.name}.kv-anchor.gguf")
    text = resolve_corpus(corpus or default_name())
    done = calibration.calibrate(found, text, build, target, ctx=ctx, chunks=chunks, threads=threads)
    print(f"{done.path}: {done.size} bytes from {done.tokens} tokens of {text.name}, sha256 {done.sha256}")
