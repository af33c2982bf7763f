"""turbo-eval inspect: what the cache types, the K anchor and the exact window would do with a model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.anchor import inspect as ask
from turbo_eval.anchor.facts import Facts, read_facts
from turbo_eval.anchor.noise import Noise, layer_noise
from turbo_eval.formats.cache_types import CACHE_TYPES
from turbo_eval.inputs.models import resolve_model
from turbo_eval.util import numbers as n

_AFFORDABLE = 2.5e8  # values of W_q and W_k: two seconds
_SHOWN = ("q8_0", "q4_0", "turbo4", "turbo3", "turbo2")
_NOISY = ("turbo4", "turbo3")


def register(app: typer.Typer) -> None:
    app.command(
        name="inspect",
        help="""What cache types, K anchor and exact window would do with a model, without running it.

          turbo-eval inspect qwen2.5-coder-0.5b

          turbo-eval inspect ~/models/mine.gguf --ctx 32768
        """,
    )(inspect)


def inspect(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    ctx: Annotated[
        int | None,
        typer.Option(
            parser=n.option("--ctx", n.TOKENS),
            metavar="N",
            help="Context in tokens (default: what the model was trained for, at most 32768).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    all_layers: Annotated[
        bool, typer.Option("--noise", help="Read the projections of a large model, too: takes its time.")
    ] = False,
) -> None:
    path = Path(model) if model.endswith(".gguf") else resolve_model(model).path
    facts = read_facts(path)
    tokens = ctx or max(1, min(facts.info.n_ctx_train, 32768))
    values = sum((layer.heads + layer.kv_heads) * layer.dim_k * facts.info.n_embd for layer in facts.layers)
    noise = (
        [layer_noise(facts, layer, tokens) for layer in facts.layers]
        if all_layers or values <= _AFFORDABLE
        else []
    )
    if as_json:
        print(json.dumps(_as_json(facts, tokens, noise), indent=1))
        return
    for line in _about(facts):
        print(line)
    console = Console(width=max(110, Console().width), highlight=False)
    console.print(_types(facts, tokens))
    if noise:
        console.print(_layers(facts, noise, tokens))
    elif facts.layers:
        print(f"W_q and W_k have {values:.2g} values; --noise reads them for the noise by layer.")


def _about(facts: Facts) -> list[str]:
    info, layers = facts.info, facts.layers
    kept = (
        f"{len(layers)} of {info.n_layer} layers keep keys and values"
        if facts.recurrent
        else (f"{info.n_layer} layers")
    )
    return [
        f"{info.name}: {info.arch}, {info.file_type}, {kept}, trained for {info.n_ctx_train} tokens",
        f"attention  {_attention(facts)}",
        f"K          {_key(facts)}",
        f"K anchor   {ask.anchor(facts)}",
        f"window     {ask.window(facts)}",
    ]


def _attention(facts: Facts) -> str:
    if not facts.layers:
        return "none"
    first = facts.layers[0]
    parts = [f"{first.heads} heads, {first.kv_heads} KV heads, head_dim {first.dim_k}"]
    if first.latent:
        parts = [f"{first.heads} heads, one compressed key of {first.dim_k} values (MLA)"]
    elif first.dim_v != first.dim_k:
        parts[0] += f" (V: {first.dim_v})"
    sliding = sum(bool(layer.sliding) for layer in facts.layers)
    if facts.window:
        told = (
            f"in {sliding} layers"
            if facts.layers[0].sliding is not None
            else "in layers the file does not name"
        )
        parts.append(f"sliding window of {facts.window} {told}")
    parts += ["sinks"] if any(layer.sinks for layer in facts.layers) else []
    parts += [f"soft-capping at {facts.softcap:g}"] if facts.softcap else []
    return ", ".join(parts)


def _key(facts: Facts) -> str:
    total = len(facts.layers)
    counts = {
        "bias": sum(layer.k_bias for layer in facts.layers),
        "norm": sum(layer.k_norm for layer in facts.layers),
    }
    parts = [
        f"{name} in {count} of {total} layers" if count else f"no {name}" for name, count in counts.items()
    ]
    dim = facts.layers[0].dim_k if facts.layers else facts.rope_dims
    return ", ".join([*parts, f"RoPE turns {facts.rope_dims} of {dim} values, base {facts.rope_base:g}"])


def _types(facts: Facts, ctx: int) -> Table:
    table = Table(title=f"K and V of one sequence of {ctx} tokens", title_justify="left")
    for name in ("type", "bits per value", "size", "with the window", "works"):
        table.add_column(name, justify="left" if name in ("type", "works") else "right")
    window = ask.window(facts)
    for name in ("f16", *_SHOWN):
        row = CACHE_TYPES[name]
        answer = ask.cache_type(facts, row)
        size = ask.cache_bytes(facts, row, ctx)
        both = _size(size + ask.window_bytes(facts)) if window.works and row.bpv < 8 else ""
        table.add_row(name, f"{row.bpv:g}", _size(size), both if answer.works else "", str(answer))
    return table


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _layers(facts: Facts, noise: list[Noise], ctx: int) -> Table:
    table = Table(
        title=f"noise of attention logits in nats (rms), anchor off → on, at {ctx} tokens",
        title_justify="left",
    )
    for name in ("layer", "largest constant of K", "taken by the anchor", *_NOISY):
        table.add_column(name, justify="right")
    on = ask.anchor(facts).works
    for found in noise:
        cells = []
        for name in _NOISY:
            error = math.sqrt(CACHE_TYPES[name].mse or 0.0)
            after = f" → {error * found.anchored:.3g}" if on else ""
            cells.append("?" if math.isnan(found.plain) else f"{error * found.plain:.3g}{after}")
        taken = "" if math.isnan(found.taken) or not on else f"{found.taken:.1%}"
        table.add_row(str(found.layer), f"{found.bias:.1f}" if found.bias else "", taken, *cells)
    return table


def _as_json(facts: Facts, ctx: int, noise: list[Noise]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "model": facts.info.model_dump(),
        "layers": [asdict(layer) for layer in facts.layers],
        "window": facts.window,
        "anchor": asdict(ask.anchor(facts)),
        "exact_window": {
            **asdict(ask.window(facts)),
            "bytes": ask.window_bytes(facts) if facts.layers else 0,
        },
        "ctx": ctx,
        "types": {
            name: {
                **asdict(ask.cache_type(facts, CACHE_TYPES[name])),
                "bytes": ask.cache_bytes(facts, CACHE_TYPES[name], ctx),
            }
            for name in ("f16", *_SHOWN)
        },
        "noise": [{key: clean(value) for key, value in asdict(found).items()} for found in noise],
    }
