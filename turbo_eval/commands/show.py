"""turbo-eval show: one record in full, and the command that reproduces it by hand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.commands import options as o
from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.evidence.position import over_position as positions
from turbo_eval.evidence.tokens import load
from turbo_eval.metrics.base_logits import BaseLogits
from turbo_eval.records.record import Record, read_record
from turbo_eval.records.store import record_files
from turbo_eval.util.paths import results_dir


def register(app: typer.Typer) -> None:
    app.command(
        help="""Print a record and the command that reproduces it by hand.

        KEY is the hexadecimal end of a record's file name (the first digits do).

          turbo-eval show 3f2a

          turbo-eval show 3f2a --over-position
        """
    )(show)


def show(
    key: Annotated[str, typer.Argument(help="Key of the record, or its first digits.")],
    results: o.Results = None,
    over_position: Annotated[
        bool,
        typer.Option("--over-position", help="Only KL divergence and ΔPPL by distance from the start."),
    ] = False,
) -> None:
    root = results or results_dir()
    files = [p for p in record_files([root]) if p.name.split(".")[-2].startswith(key)]
    if not files:
        raise UsageError(
            f"no record under {root} has a key that starts with {key}", "see `turbo-eval results list`"
        )
    if len(files) > 1:
        names = ", ".join(p.name.split(".")[-2] for p in files[:5])
        raise UsageError(f"{len(files)} records have keys that start with {key}: {names}", "give more digits")
    record = read_record(files[0])
    if over_position:
        _print_positions(record, files[0].parent)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(record.model_dump(mode="json", exclude={"run": {"argv"}})):
        table.add_row(name, value)
    Console(highlight=False).print(table)
    print("\nby hand:\n")
    if record.cell.metric == "kld" and record.cell.engine == "llama-perplexity":
        _print_base_command(record)
    print(command(record.run.argv, record.run.env, record.run.env_removed))


def _print_positions(record: Record, folder: Path) -> None:
    """A line for each span of the context."""
    if record.tokens is None:
        raise IncompleteError(
            f"{record.key} has no figures of each token", "measure it with llama-kv-eval (sweep --fresh)"
        )
    tokens = load(folder / record.tokens.file, record.tokens.sha256)
    table = Table("tokens before", "KLD", "95 %", "ΔPPL %", "95 %", box=None)
    for span in positions(tokens, record.cell.ctx):
        kld, delta = span.kld, span.delta_pct
        table.add_row(
            f"{span.first} – {span.last}",
            f"{kld.value:z.5f}",
            f"{kld.low:z.5f} – {kld.high:z.5f}",
            f"{delta.value:+.2f}",
            f"{delta.low:+.2f} – {delta.high:+.2f}",
        )
    Console(highlight=False).print(table)


def _print_base_command(record: Record) -> None:
    """The f16/f16 run comes first; its log-probabilities may have left the cache since."""

    path = BaseLogits.default().path(record.cell, record.machine)
    try:
        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        argv = tuple(str(a) for a in note["argv"])
    except (OSError, ValueError, KeyError):
        print("# its base logits have left the cache; `turbo-eval sweep` with --fresh makes them again\n")
        return
    print(command(argv, record.run.env, record.run.env_removed) + "\n")


def command(argv: tuple[str, ...], env: dict[str, str], removed: tuple[str, ...]) -> str:
    """The shell command line of a run, its environment included."""
    settings = ["LC_ALL=C", *(f"{name}={shlex.quote(value)}" for name, value in env.items())]
    unset = " ".join(f"-u {name}" for name in removed)
    return " ".join([*(["env", unset] if unset else ["env"]), *settings, shlex.join(argv)])


def _lines(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names."""
    lines: list[tuple[str, str]] = []
    for name, value in data.items():
        if isinstance(value, dict) and value:
            lines += _lines(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            lines.append((prefix + name, " ".join(map(str, value))))
        elif value not in (None, {}, ""):
            lines.append((prefix + name, str(value)))
    return lines
