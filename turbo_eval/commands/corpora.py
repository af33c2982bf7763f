"""`turbo-eval corpora list|get|path`."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from turbo_eval.commands import _assets
from turbo_eval.inputs import corpora
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.registry import Entry


def _registry() -> Mapping[str, Entry]:
    return corpora.registry()


def _resolve(name_or_path: str, *, download: bool = True) -> CorpusFile:
    return corpora.resolve_corpus(name_or_path, download=download)


def _default() -> str:
    return corpora.default_name()


def register(app: typer.Typer) -> None:
    app.add_typer(
        _assets.group(
            "corpora",
            _registry,
            _resolve,
            default=_default,
            example="news-prose",
            help_text="""Texts by name (configs/corpora.toml) or path.

              turbo-eval corpora list

              turbo-eval corpora get news-prose

              turbo-eval corpora get wiki.test.raw
            """,
        ),
        name="corpora",
        rich_help_panel="Prepare",
    )
