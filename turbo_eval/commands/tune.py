"""turbo-eval tune: a KV profile for a model."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.anchor.calibrate import TOOL
from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.inputs.corpora import default_name, resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.serving.line import Cache, server_argv
from turbo_eval.tune import run


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Prepare",
        help="""Find the cache types of each layer for a model, prove them, write a profile for llama.cpp.

        Half of the text finds the types, the other half judges them. What was measured is kept in
        PROFILE.tune beside the profile: a run that was interrupted goes on from there.

          turbo-eval tune qwen2.5-coder-0.5b --bits 3.25

          turbo-eval tune my.gguf --max-kld 0.01 --corpus my.txt --out my.kv-profile.gguf
        """,
    )(tune)


def tune(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    bits: Annotated[
        float | None, typer.Option(help="Bits a value, at most (default 3.25).", show_default=False)
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(help="Instead: the fewest bits with this KL divergence, nats.", show_default=False),
    ] = None,
    corpus: o.Corpus = None,
    ctx: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 2048,
    chunks: Annotated[int, typer.Option(help="Chunks to measure on.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: MODEL.kv-profile.gguf.", show_default=False)
    ] = None,
    threads: o.Threads = None,
    backend: o.Backend = None,
    bin_dir: o.BinDir = None,
) -> None:
    if bits is not None and max_kld is not None:
        raise UsageError("--bits and --max-kld ask for two things at once", "give one of them")
    for name, value in (("--bits", bits), ("--max-kld", max_kld)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} {value} is no positive number")
    if ctx < 256 or chunks < 1:
        raise UsageError(f"{chunks} chunks of {ctx} tokens are no text", "ask for at least 1 chunk of 256")
    build = o.load_build(backend or "cpu", bin_dir)
    build.tool(TOOL)  # before anything is downloaded
    found = resolve_model(model)
    target = out or Path(f"{found.name}.kv-profile.gguf")
    text = resolve_corpus(corpus or default_name())
    settings = run.Settings(
        None if max_kld is not None else bits or 3.25, max_kld, ctx=ctx, chunks=chunks, threads=threads
    )
    console, progress = Console(), Console(stderr=True)
    begin = time.monotonic()

    def on_step(step: int, total: int, what: str) -> None:
        left = (time.monotonic() - begin) / max(step - 1, 1) * (total - step + 1)
        progress.print(f"{step}/{total} {what}" + (f" ({left / 60:.0f} min left)" if step > 3 else ""))

    done = run.tune(found, text, build, target, settings, on_step)
    table = Table("cache", "bits a value", "KL divergence", "±")
    for row in done.rows:
        table.add_row(row.name, f"{row.bits:.2f}", f"{row.kld.mean:.5f}", f"{row.kld.error:.5f}")
    console.print(table)
    console.print(
        f"predicted {done.predicted:.5f}, held out {done.held_out.mean:.5f} ± {done.held_out.error:.5f}"
    )
    line = server_argv(build, found.path, Cache(profile=done.path))
    console.print(shlex.join(line), soft_wrap=True, highlight=False)
    console.print(
        shlex.join(["turbo-eval", "serve", model, "--profile", str(done.path)]),
        soft_wrap=True,
        highlight=False,
    )
