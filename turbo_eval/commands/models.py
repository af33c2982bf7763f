"""`turbo-eval models list|get|path`."""

from __future__ import annotations

import typer

from turbo_eval import models
from turbo_eval.commands import _assets


def _describe(found: _assets.Asset) -> str:
    if not isinstance(found, models.ModelFile):
        return ""
    info = found.gguf
    heads = f"{info.n_head} heads, {info.n_head_kv} KV heads, head_dim {info.head_dim_k}"
    return f", {info.arch} {info.file_type}, {info.n_layer} layers, {heads}"


def register(app: typer.Typer) -> None:
    app.add_typer(
        _assets.group(
            "models",
            models.registry,
            models.resolve_model,
            describe=_describe,
            help_text="""Models by name (configs/models.toml) or path.

              turbo-eval models list

              turbo-eval models get smollm2-135m

              turbo-eval models get ~/models/mine.gguf
            """,
        ),
        name="models",
        rich_help_panel="Prepare",
    )
