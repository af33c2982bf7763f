"""turbo-eval report: one page that shows what is on record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.analysis import figures
from turbo_eval.analysis import report as reports
from turbo_eval.analysis.picture.front import draw
from turbo_eval.analysis.picture.points import front as front_of
from turbo_eval.analysis.staleness import stale
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.analysis.written import write, written
from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.records.record import Record
from turbo_eval.records.speed import read_bench
from turbo_eval.records.store import read_all, record_folders, warn_once
from turbo_eval.util import numbers as n
from turbo_eval.util.paths import repo_root, results_dir


def register(app: typer.Typer) -> None:
    app.command(
        help="""Write index.html (self-contained), report.md and figures/ (SVG, PNG).

        ΔPPL is against f16/f16 of the same text and build.

          turbo-eval report --out report

          turbo-eval report results/reference/NAME --front front.svg --at 8192

          turbo-eval report --readme --check
        """
    )(report)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Record files or folders (default: results/).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Only print the markdown.")] = False,
    front: Annotated[
        Path | None,
        typer.Option(help="Only draw loss against memory, to this .svg or .png.", show_default=False),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(
            parser=n.option("--at", n.TOKENS),
            metavar="N",
            help="With --front: count memory at N tokens (default: those that were measured).",
        ),
    ] = None,
    readme: Annotated[
        bool,
        typer.Option("--readme", help="Only write the tables in README and docs, from results/reference/."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --readme: write nothing; exit code 1 if one differs.")
    ] = False,
) -> None:
    if check and not readme:
        raise UsageError("--check is about --readme", "give both")
    if readme:
        _readme(check)
        return
    places = results or [results_dir()]
    records = read_all(places)
    benches = [b for place in places if place.is_dir() for b in read_bench(place)]
    for sentence in stale(records):
        warn_once(sentence)
    if not records and not benches:
        raise IncompleteError("there are no records", "run `turbo-eval sweep configs/demo.toml` first")
    if front is not None:
        _draw(records, front, at)
        return
    if markdown:
        groups = [rows for _, rows in by_setting(summarize(records))]
        print(reports.markdown(groups, records, benches), end="")
        return
    print(reports.write_report(records, benches, out, record_folders(places)))


def _draw(records: Sequence[Record], out: Path, at: int | None) -> None:
    """The front of the only setting among the records."""
    groups = reports.worth_showing([rows for _, rows in by_setting(summarize(records))])
    if len(groups) != 1:
        raise UsageError(
            f"a front is of one setting, and there are {len(groups)} on record",
            "name the record files or the folder of one model, text and build",
        )
    found = front_of(groups[0], at)
    if found is None:
        raise IncompleteError("no quantized pair with a loss is on record", "run `turbo-eval sweep` first")
    figures.save(draw(found), out, found.said())
    print(out)


def _readme(check: bool) -> None:
    """Write the tables that stand between marks, or say which are not what the records give."""
    root = repo_root()
    found = written(root, root / "results" / "reference")
    if not check:
        for path in write(found):
            print(path.relative_to(root))
        return
    for one in found:
        for name in one.differing:
            place = one.path.relative_to(root)
            print(
                f"turbo-eval: the table {name!r} in {place} is not what the records give; run"
                " `turbo-eval report --readme`",
                file=sys.stderr,
            )
    if any(one.differing for one in found):
        raise typer.Exit(1)
