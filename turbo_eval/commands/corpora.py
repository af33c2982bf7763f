"""`turbo-eval corpora list|get|path`."""

from __future__ import annotations

import typer

from turbo_eval import corpora
from turbo_eval.commands import _assets


def register(app: typer.Typer) -> None:
    app.add_typer(
        _assets.group(
            "corpora",
            corpora.registry,
            corpora.resolve_corpus,
            default=corpora.default_name,
            help_text="""Texts by name (configs/corpora.toml) or path.

              turbo-eval corpora list

              turbo-eval corpora get news-prose

              turbo-eval corpora get wiki.test.raw
            """,
        ),
        name="corpora",
        rich_help_panel="Prepare",
    )
