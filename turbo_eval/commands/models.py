"""`turbo-eval models list|get|path`."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from turbo_eval.commands import _assets
from turbo_eval.inputs import models
from turbo_eval.inputs.models import ModelFile
from turbo_eval.inputs.registry import Entry


def _registry() -> Mapping[str, Entry]:
    return models.registry()


def _resolve(name_or_path: str, *, download: bool = True) -> ModelFile:
    return models.resolve_model(name_or_path, download=download)


def _describe(found: _assets.Asset) -> str:
    if not isinstance(found, ModelFile):
        return ""
    info = found.gguf
    heads = f"{info.n_head} heads, {info.n_head_kv} KV heads, head_dim {info.head_dim_k}"
    return f", {info.arch} {info.file_type}, {info.n_layer} layers, {heads}"


def register(app: typer.Typer) -> None:
    app.add_typer(
        _assets.group(
            "models",
            _registry,
            _resolve,
            describe=_describe,
            example="smollm2-135m",
            help_text="""Models by name (configs/models.toml) or path.

              turbo-eval models list

              turbo-eval models get smollm2-135m

              turbo-eval models get ~/models/mine.gguf
            """,
        ),
        name="models",
        rich_help_panel="Prepare",
    )
