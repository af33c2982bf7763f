"""The `list|get|path` commands that models and corpora share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.errors import TurboEvalError
from turbo_eval.inputs.registry import Entry


class Asset(Protocol):
    """What a resolved model and a resolved corpus have in common."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def sha256(self) -> str: ...
    @property
    def size(self) -> int: ...


class Resolve(Protocol):
    def __call__(self, name_or_path: str, *, download: bool = True) -> Asset: ...


def listing(entries: Mapping[str, Entry], resolve: Resolve, default: str = "") -> Table:
    """One row an entry: name, what it is, size, whether it is here, where it comes from."""

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "what", "size", "here", "from"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for name, entry in entries.items():
        size, here = entry.size, "no"
        try:
            found = resolve(name, download=False)
            size, here = found.size, "yes"
        except TurboEvalError as error:
            if "sha256" in error.message:
                here = "[red]damaged[/red]"
        shown = f"{size / 1e6:.1f} MB" if size else "?"
        mark = " (default)" if name == default else ""
        table.add_row(name + mark, entry.title, shown, here, entry.origin)
    return table


def group(
    what: str,
    entries: Callable[[], Mapping[str, Entry]],
    resolve: Resolve,
    *,
    help_text: str,
    example: str,
    default: Callable[[], str] = lambda: "",
    describe: Callable[[Asset], str] = lambda _: "",
) -> typer.Typer:
    """Build the command group."""
    commands = typer.Typer(no_args_is_help=True, help=help_text)

    def page(text: str, command: str) -> str:
        line = f"turbo-eval {what} {command}" + ("" if command == "list" else f" {example}")
        return f"{text}\n\n  {line}"

    @commands.command("list", help=page(f"The {what} known by name, and which are here.", "list"))
    def list_() -> None:
        Console(soft_wrap=True, highlight=False).print(listing(entries(), resolve, default()))

    @commands.command(
        "get",
        help=page("Download what isn't here, verify its sha256, print what it is.", "get"),
    )
    def get(names: list[str] = typer.Argument(help="Names from `list`, or paths.")) -> None:
        for name in names:
            found = resolve(name)
            extra = describe(found)
            print(f"{found.name}: {found.path}, {found.size} bytes, sha256 {found.sha256}{extra}")

    @commands.command(
        "path",
        help=page("Print where it lies, and nothing else; never downloads.", "path"),
    )
    def path(name: str = typer.Argument(help="Name from `list`, or a path.")) -> None:
        print(resolve(name, download=False).path)

    return commands
