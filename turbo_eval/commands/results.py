"""turbo-eval results: list, prune, export and submit what is on record."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.commands import options as o
from turbo_eval.errors import EnvironmentProblem, IncompleteError, UsageError
from turbo_eval.records.record import Record, json_schema, read_record
from turbo_eval.records.share import problems, scrub
from turbo_eval.records.store import Store, read_all, record_files
from turbo_eval.sweep.progress import outcome
from turbo_eval.util.files import writing
from turbo_eval.util.paths import results_dir

results_app = typer.Typer(no_args_is_help=True, help="List, prune, export and submit what is on record.")


def register(app: typer.Typer) -> None:
    app.add_typer(results_app, name="results")


@results_app.command("list")
def list_(results: o.Results = None) -> None:
    """Every record: key, machine, cell, status, figure, when.

    turbo-eval results list --results results
    """

    table = Table("key", "model", "K/V", "metric", "ctx", "chunks", "tree", "started", "outcome", box=None)
    for record in _records(results):
        cell = record.cell
        row = [record.key, cell.model, f"{cell.k}/{cell.v}", cell.metric, str(cell.ctx), str(cell.chunks)]
        row += [cell.tree[:8], record.run.started[:16], outcome(record)]
        table.add_row(*row, style=None if record.ok else "red")
    Console().print(table)


@results_app.command()
def prune(
    results: o.Results = None,
    failed: Annotated[bool, typer.Option("--failed", help="Records without a number.")] = False,
    keep_tree: Annotated[
        str | None, typer.Option(help="Drop records of trees that don't start with this.", show_default=False)
    ] = None,
    unreadable: Annotated[bool, typer.Option("--unreadable", help="Files that are no records.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; without, only say what would go.")] = False,
) -> None:
    """Delete records and their logs; says which and does nothing without --yes.

    turbo-eval results prune --failed --yes

    turbo-eval results prune --keep-tree 3f2a91 --unreadable
    """

    if not (failed or keep_tree or unreadable):
        raise UsageError("nothing to prune was named", "give --failed, --keep-tree or --unreadable")
    root = results or results_dir()
    doomed: list[tuple[Path, str]] = []
    for path in record_files([root]):
        try:
            record = read_record(path)
        except IncompleteError:
            if unreadable:
                doomed.append((path, "unreadable"))
            continue
        if failed and not record.ok:
            doomed.append((path, record.status))
        elif keep_tree and not record.cell.tree.startswith(keep_tree):
            doomed.append((path, f"tree {record.cell.tree[:12]}"))
    for path, why in doomed:
        print(f"{'deleted' if yes else 'would delete'} {path}: {why}")
        if yes:
            path.unlink()
            key = path.name.split(".")[-2]
            (path.parent / "logs" / f"{key}.log").unlink(missing_ok=True)
    if doomed and not yes:
        print("nothing was deleted; add --yes to do it")


@results_app.command()
def export(
    out: Annotated[Path, typer.Argument(help="File to write: .csv, .parquet or .json.")],
    results: o.Results = None,
) -> None:
    """One flat line a record, for other tools.

    turbo-eval results export all.parquet
    """

    rows = [_flat(record) for record in _records(results)]
    if out.suffix not in (".csv", ".parquet", ".json"):
        raise UsageError(f"{out} ends in none of .csv, .parquet and .json", "choose one of them")
    if not out.parent.is_dir():
        raise UsageError(f"the folder of {out} does not exist", "make it first")
    with writing(out):
        if out.suffix == ".json":
            out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return

        frame = pd.DataFrame(rows)
        if out.suffix == ".csv":
            frame.to_csv(out, index=False)
            return
        try:
            frame.to_parquet(out, index=False)
        except ImportError:
            raise EnvironmentProblem(
                "writing Parquet needs pyarrow", "install it or export to .csv"
            ) from None


@results_app.command()
def submit(
    name: Annotated[str, typer.Argument(help="Name of the folder, e.g. qwen3-8b-rtx-4090.")],
    results: o.Results = None,
    out: Annotated[Path, typer.Option(help="Where the folder is made.")] = Path("results/reference"),
) -> None:
    """Make a folder of records to show to others: checked, and without paths of this machine.

    Checks schema and identity, provenance, plausibility, and that no path, host or user name is left. Failed
    cells go along: they are results too.

    turbo-eval results submit qwen3-8b-rtx-4090 --results results/MACHINE
    """

    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UsageError(f"{name!r} is no folder name for everyone", "take small letters, digits, . and -")
    records = [scrub(read_record(path)) for path in record_files([results or results_dir()])]
    if not records:
        raise IncompleteError("there are no records", "run `turbo-eval sweep` first")
    found = problems(records)
    for sentence in found:
        print(f"- {sentence}")
    if found:
        raise IncompleteError(
            f"{len(found)} reasons not to show these {len(records)} records",
            "mend them, or give --results a folder with fewer records",
        )
    folder = out / name
    if folder.exists():
        raise UsageError(f"{folder} is there already", "take another name, or remove it first")
    for record in records:
        Store(folder, record.machine).write(record)
    print(f"{folder}: {len(records)} records. Add the folder to a pull request.")


@results_app.command()
def schema() -> None:
    """The JSON schema of a record, as published in docs/reference/record.schema.json.

    turbo-eval results schema > record.schema.json
    """

    print(json_schema(), end="")


def _records(results: Path | None) -> list[Record]:
    return read_all([results or results_dir()])


def _flat(record: Record) -> dict[str, Any]:
    """A record's row with its nested figures as dotted columns; lists are left to the JSON files."""
    flat: dict[str, Any] = {}
    for name, value in record.row().items():
        if name in ("kld", "decode", "greedy", "needle"):
            for inner, figure in (value or {}).items():
                if not isinstance(figure, list):
                    flat[f"{name}.{inner}"] = figure
        else:
            flat[name] = value
    return flat
