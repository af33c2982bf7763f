"""turbo-eval tune: a KV profile for a model."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from turbo_eval.analysis.figures import save, tuning_figure
from turbo_eval.anchor.calibrate import TOOL
from turbo_eval.commands import options as o
from turbo_eval.errors import RegressionError, UsageError
from turbo_eval.inputs.corpora import default_name, resolve_corpus
from turbo_eval.inputs.kv_profile import model_shape
from turbo_eval.inputs.models import ModelFile, resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.serving.line import Cache, server_argv
from turbo_eval.tune import run
from turbo_eval.tune.measure import TOOL as MEASURE
from turbo_eval.tune.measure import Extent
from turbo_eval.tune.prepare import BETWEEN, RIVALS, Plan, alone
from turbo_eval.util import numbers as n


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Prepare",
        help="""Find the cache types of each layer for a model, prove them, write a profile for llama.cpp.

        Half of the text finds the types, the other half judges them. What was measured is kept in
        PROFILE.tune beside the profile: a run that was interrupted goes on from there. Exit code 1: no types
        keep the bound, the nearest is named.

          turbo-eval tune qwen2.5-coder-0.5b --bits 3.25

          turbo-eval tune my.gguf --max-kld 0.01 --corpus my.txt --out my.kv-profile.gguf

          turbo-eval tune my.gguf --memory 2 --ctx 32768 --budget 30
        """,
    )(tune)


def _above_zero(name: str, words: str) -> Any:
    kind = n.Kind("a number, more than 0", above=0)
    return typer.Option(name, parser=n.option(name, kind), metavar="X", help=f"{words}.", show_default=False)


def tune(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    bits: Annotated[float | None, _above_zero("--bits", "Bits a value at most (default 3.25)")] = None,
    max_kld: Annotated[
        float | None, _above_zero("--max-kld", "Instead: fewest bits with this KL divergence, nats")
    ] = None,
    max_delta_ppl: Annotated[
        float | None,
        typer.Option(
            parser=n.percent("--max-delta-ppl", n.MARGIN),
            metavar="PERCENT",
            help="Instead: fewest bits with this ΔPPL.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        float | None, _above_zero("--memory", "Instead: bits that fit --ctx tokens into so many GiB")
    ] = None,
    corpus: o.Corpus = None,
    ctx: Annotated[
        int, typer.Option(parser=n.option("--ctx", n.CONTEXT), metavar="N", help="Tokens of a context.")
    ] = 2048,
    chunks: Annotated[
        int, typer.Option(parser=n.option("--chunks", n.COUNT), metavar="N", help="Contexts to judge on.")
    ] = 2,
    budget: Annotated[
        float | None, _above_zero("--budget", "Minutes for all of it: less text where time is short")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: MODEL.kv-profile.gguf.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: .svg or .png.", show_default=False)] = None,
    threads: o.Threads = None,
    backend: o.Backend = None,
    bin_dir: o.BinDir = None,
) -> None:
    asked = {"--bits": bits, "--max-kld": max_kld, "--max-delta-ppl": max_delta_ppl, "--memory": memory}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} ask for two things at once", "give one of them")
    if ctx < 256:
        raise UsageError(f"a context of {ctx} tokens is all exact window", "ask for at least 256")
    build = o.load_build(backend or "cpu", bin_dir)
    build.tool(TOOL), build.tool(MEASURE)  # before anything is downloaded
    found = resolve_model(model)
    target = out or Path(f"{found.name}.kv-profile.gguf")
    text = resolve_corpus(corpus or default_name())
    plan = Plan(
        Extent(min(ctx, _LONGEST, found.gguf.n_ctx_train or ctx), chunks),
        budget=budget * 60 if budget is not None else None,
        threads=threads,
    )
    if memory is not None:
        bits = bits_in(memory, ctx, found, plan)
    elif not given:
        bits = 3.25
    goal = run.Goal(bits, max_kld, max_delta_ppl)
    _announce(replace(plan, tried=goal.tried), found, target)
    done = run.tune(found, text, build, target, plan, goal, _Said())
    _show(done, found, build, ctx)
    if plot is not None:
        save(tuning_figure(done), plot)


_FLOPS = 1.8e11  # a second and thread, of a CPU with AVX-512; after the calibration the time left is measured
_LONGEST = 4096  # tokens of a chunk: the divergence hardly grows beyond


def bits_in(gib: float, ctx: int, model: ModelFile, plan: Plan) -> float:
    """Bits a value of a cache of `ctx` tokens that takes `gib` GiB, window counted.

    Raises:
        RegressionError: fewer than any types have; says how much they take.
    """
    info = model.gguf
    values = info.n_layer * info.n_head_kv * (info.head_dim_k + info.head_dim_v)
    window = math.ceil((plan.recent + plan.first) / 16) * 16 * values * 8.5 / 8
    bits = 8 * (gib * 2**30 - window) / (values * ctx)
    if bits < run.LEAST_BITS:
        least = (run.LEAST_BITS * values * ctx / 8 + window) / 2**30
        raise RegressionError(
            f"no types fit {ctx} tokens into {gib:g} GiB; the nearest, {run.LEAST_BITS:g} bits a value, take"
            f" {least:.3f} GiB"
        )
    return min(bits, run.TOP_BITS)


class _Said:
    """One line on stderr a step, with the time that is left."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, share: float, what: str, left: float | None) -> None:
        gone = (time.monotonic() - self._begin) / 60
        tail = f", about {left / 60:.0f} min left" if left is not None else ""
        print(f"{gone:5.1f} min  {100 * share:3.0f} %  {what}{tail}", file=sys.stderr, flush=True)


def _announce(plan: Plan, model: ModelFile, target: Path) -> None:
    """What will run, and on a CPU about how long; after the calibration the time is measured."""
    layers, tokens = model.gguf.n_layer, plan.tokens(model.gguf.n_layer)
    seconds = 2 * tokens * model_shape(model.path).n_params / ((plan.threads or os.cpu_count() or 1) * _FLOPS)
    minutes = min(seconds, plan.budget or seconds) / 60
    print(
        f"{alone(layers)} caches on the text that finds the types, {BETWEEN} to choose from,"
        f" {plan.tried + RIVALS} on other text: {tokens} tokens, roughly {minutes:.0f} min;"
        f" what was measured is kept in {target.with_suffix('.tune')}",
        file=sys.stderr,
    )


def _show(done: run.Tuned, model: ModelFile, build: Build, ctx: int) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("cache", "bits a value", "KL divergence", "ΔPPL %", "KV MiB"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in done.rows:
        d = row.kld
        table.add_row(
            row.name,
            f"{row.bits:.2f}",
            f"{d.mean:.5f} ± {d.error:.5f}",
            f"{d.delta_pct:+.2f} ± {d.delta_err_pct:.2f}",
            f"{d.mib:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    print(
        f"predicted {done.predicted:.5f}, held out {done.held_out.mean:.5f} ± {done.held_out.error:.5f};"
        f" {done.what}"
    )
    print(shlex.join(server_argv(build, model.path, Cache(profile=done.path), ctx=ctx)))
    serve = ["turbo-eval", "serve", str(model.path), "--profile", str(done.path), "--ctx", str(ctx)]
    print(shlex.join(serve))
