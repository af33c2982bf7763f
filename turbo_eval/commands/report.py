"""turbo-eval report: one page that shows what is on record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.analysis import report as reports
from turbo_eval.analysis.staleness import stale
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.errors import IncompleteError
from turbo_eval.records.speed import read_bench
from turbo_eval.records.store import read_all, warn_once
from turbo_eval.util.paths import results_dir


def register(app: typer.Typer) -> None:
    app.command(
        help="""Write index.html (self-contained), report.md and figures/ (SVG, PNG).

        ΔPPL is against f16/f16 of the same text and build.

          turbo-eval report --out report
        """
    )(report)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Record files or folders (default: results/).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Only print the markdown.")] = False,
) -> None:
    places = results or [results_dir()]
    records = read_all(places)
    benches = [b for place in places if place.is_dir() for b in read_bench(place)]
    for sentence in stale(records):
        warn_once(sentence)
    if not records and not benches:
        raise IncompleteError("there are no records", "run `turbo-eval sweep configs/demo.toml` first")
    if markdown:
        groups = [rows for _, rows in by_setting(summarize(records))]
        print(reports.markdown(groups, records, benches), end="")
        return
    print(reports.write_report(records, benches, out))
