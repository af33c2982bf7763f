"""`turbo-eval doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.setup import doctor
from turbo_eval.setup.doctor import Item


def register(app: typer.Typer) -> None:
    @app.command("doctor", rich_help_panel="Prepare")
    def examine(
        as_json: bool = typer.Option(False, "--json", help="A JSON list of findings on stdout."),
    ) -> None:
        """What is here, what is missing, and the command that fixes it.

        Exit code 4 when something is missing that a sweep on the CPU needs.

        turbo-eval doctor --json
        """

        findings = list(doctor.examine())
        if as_json:
            print(json.dumps([asdict(finding) for finding in findings], indent=1))
        else:
            Console(soft_wrap=True, highlight=False).print(_table(findings))
        missing = [finding for finding in findings if finding.required and not finding.ok]
        if missing:
            names = ", ".join(f"{finding.section} {finding.name}" for finding in missing)
            raise EnvironmentProblem(f"a sweep on the CPU cannot run yet: {names}", missing[0].fix)


def _table(findings: list[Item]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for finding in findings:
        mark = "[red]--[/red]" if finding.required else "[yellow]--[/yellow]"
        fix = f" → {finding.fix}" if finding.fix and not finding.ok else ""
        head = f"[bold]{finding.section}[/bold]" if finding.section != section else ""
        section = finding.section
        table.add_row(
            head, finding.name, "[green]ok[/green]" if finding.ok else mark, escape(finding.detail + fix)
        )
    return table
