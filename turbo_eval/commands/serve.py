"""turbo-eval serve: llama-server with a cache that was measured."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from turbo_eval.analysis.recommend import Bound
from turbo_eval.commands import options as o
from turbo_eval.commands.recommend import MaxDelta, MaxKld
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.formats.cache_types import parse_pair
from turbo_eval.inputs.models import ModelFile, resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import machine
from turbo_eval.llama.tool import check_types
from turbo_eval.records.store import Store
from turbo_eval.serving.choose import Choice, Records, profile
from turbo_eval.serving.line import TOOL, server_argv
from turbo_eval.serving.server import Server
from turbo_eval.util import numbers as n
from turbo_eval.util.paths import results_dir


def register(app: typer.Typer) -> None:
    app.command(
        help="""Run llama-server with a cache that was measured, and say what to expect of it.

        Takes the cheapest pair on record that is certainly within the bound, or the cache that is named.
        Prints the llama-server line, starts it, waits until it answers, says what it runs. Signals go to the
        server, and its exit code is that of this command. What follows -- is llama-server's own.

          turbo-eval serve smollm2-135m --max-kld 0.05

          turbo-eval serve qwen2.5-coder-0.5b --pair q8_0:turbo3 --ctx 16384 -- --jinja -np 2

          turbo-eval serve my.gguf --profile my.kv-profile.gguf --dry-run
        """
    )(serve)


def serve(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Options of llama-server.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option("--pair", "-p", metavar="K:V", help="This pair.", show_default=False)
    ] = None,
    profile_: Annotated[
        Path | None,
        typer.Option("--profile", help="This profile, as `tune` writes it.", show_default=False),
    ] = None,
    max_kld: MaxKld = None,
    max_delta_ppl: MaxDelta = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            parser=n.option("--ctx", n.TOKENS), metavar="N", help="Context in tokens (default: the model's)."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8080,
    backend: o.Backend = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the line and start nothing.")] = False,
) -> None:
    bounds = max_kld is not None or max_delta_ppl is not None
    asked = (pair is not None) + (profile_ is not None) + bounds
    if asked > 1:
        raise UsageError("--pair, --profile and a bound name the cache in different ways", "give one of them")
    if not asked:
        max_delta_ppl = 3.0
        o.warn("no cache was named, taking --max-delta-ppl 3%")
    build = o.load_build(backend or "cpu", bin_dir)
    if not dry_run and not (build.bin_dir / TOOL).is_file():
        missing = f"the build in {build.bin_dir} has no {TOOL}"
        raise EnvironmentProblem(missing, f"run `turbo-eval build {build.backend}`, which makes it")
    types = parse_pair(pair) if pair is not None else None
    if types is not None:
        check_types(build, (types,))
    file = resolve_model(model)
    size = ctx or file.gguf.n_ctx_train or 4096
    if profile_ is not None:
        choice = profile(profile_)
    else:
        records = Records(Store(results or results_dir(), machine().id), file, model, build)
        bound = Bound(max_kld, max_delta_ppl, None)
        choice = records.pair(*types) if types is not None else records.cheapest(size, bound)
    extra = extra or []
    if not any(item in ("--port", "--host") for item in extra):
        extra = ["--port", str(port), *extra]
    argv = server_argv(build, file.path, choice.cache, ctx=size, extra=extra)
    print(shlex.join(argv), flush=True)
    if not dry_run:
        raise typer.Exit(_run(argv, file, choice, build))


def _run(argv: list[str], file: ModelFile, choice: Choice, build: Build) -> int:
    server = Server(argv)
    ready = server.ready()
    if ready:
        print(f"serving {file.name} at {server.url} (OpenAI's API at {server.url}/v1)")
        print(said_of_cache(server.props(), choice))
        expected = f"{choice.figures}, measured on {choice.source}" if choice.figures else choice.source
        print(f"expected: {expected}", flush=True)
    code = server.wait()
    if not ready and code not in (130, 143):
        print(
            f"turbo-eval: {TOOL} ended before it was ready (exit code {code}): {server.reason()}",
            file=sys.stderr,
        )
        return code or 4
    return code


def said_of_cache(props: Mapping[str, Any], choice: Choice) -> str:
    """One line on the cache that runs, as the server tells it."""
    cache = props.get("kv_cache")
    if not isinstance(cache, dict) or "bytes" not in cache:
        return f"KV cache: {choice.cache.name}; the server says no more of it"
    bits = f"{cache['bits_per_value']:.2f} bits per value"
    window = "window off"
    if cache["bytes_window"]:
        bits += f", {cache['bits_per_value_window']:.2f} with the window"
        window = f"window {cache['recent']}+{cache['first']} in {cache['recent_type']}"
    layers, anchored, balanced = (cache[f"n_layer{name}"] for name in ("", "_anchor", "_balance"))
    anchor = "anchor off"
    if anchored or balanced:
        anchor = f"anchor in {anchored} and balance in {balanced} of {layers} layers"
    return (
        f"KV cache: K {cache['type_k']}, V {cache['type_v']}; {bits}; {window}; {anchor};"
        f" {cache['bytes'] / 2**20:.1f} MiB"
    )
