"""`turbo-eval patches …`: the series in patches/ and the worktree it is applied to."""

from __future__ import annotations

import subprocess
import sys

import typer
from rich.console import Console
from rich.table import Table

from turbo_eval.errors import RegressionError
from turbo_eval.llama import patches
from turbo_eval.util import paths, python

group = typer.Typer(
    no_args_is_help=True,
    help="""The patch series: what this fork adds to llama.cpp.

    Edit in build/src with ordinary commits, then write the series out again:

      turbo-eval patches apply

      cd build/src && $EDITOR … && git commit -a --fixup <commit> && git rebase --autosquash <pin>

      turbo-eval patches refresh && turbo-eval patches check
    """,
)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="patches", rich_help_panel="Prepare")


@group.command()
def status() -> None:
    """Pin, series, and whether build/src holds exactly that.

    turbo-eval patches status
    """

    now = patches.status()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("pin", now.pin)
    table.add_row("series", f"{len(now.patches)} patches, sha256 {now.series_sha256[:16]}")
    for name in now.patches:
        table.add_row("", name)
    table.add_row("worktree", str(now.worktree))
    table.add_row("state", now.summary())
    if now.head:
        table.add_row("commit", now.head)
        table.add_row("tree", now.tree)
    Console(soft_wrap=True, highlight=False).print(table)


@group.command()
def apply(
    force: bool = typer.Option(False, "--force", help="Throw away edits that the series does not hold."),
) -> None:
    """Bring build/src to pin + series; the commit is the same on every machine.

    turbo-eval patches apply --force
    """

    now = patches.apply(force=force)
    print(
        f"{len(now.patches)} patches on {now.pin[:12]}: commit {now.head}, tree {now.tree}, in {now.worktree}"
    )


@group.command()
def refresh() -> None:
    """Write build/src's commits above the pin out as patches/ and its series.

    turbo-eval patches refresh && git diff --stat patches
    """

    changes = patches.refresh()
    print("\n".join(changes) if changes else "nothing changed")


@group.command()
def check() -> None:
    """Is the series sound? Exit 1 and a sentence for each thing that isn't. Needs no compiler.

    turbo-eval patches check
    """

    problems = patches.check()
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        plural = "s" if len(problems) > 1 else ""
        raise RegressionError(f"the patch series has {len(problems)} problem{plural} (above)")
    print(f"{len(patches.read_series())} patches: listed, explained, apply cleanly, export byte for byte")


@group.command()
def rebase(
    revision: str = typer.Argument(help="Commit id or tag of upstream."),
    build: bool = typer.Option(True, help="Build for the CPU and run a smoke sweep afterwards."),
) -> None:
    """Move the pin to another upstream revision and the patches with it.

    turbo-eval patches rebase b10234
    """

    now = patches.rebase(revision)
    print(f"{len(now.patches)} patches now on {now.pin}")
    if build:
        command = python.command("-m", "turbo_eval")
        for step in (["build", "cpu"], ["sweep", str(paths.configs_dir() / "demo.toml"), "--chunks", "1"]):
            code = subprocess.run([*command, *step]).returncode
            if code:
                raise RegressionError(
                    f"the series is rebased, but `turbo-eval {' '.join(step)}` exits with {code}",
                    "repair it in build/src and run `turbo-eval patches refresh`",
                )
    print("commit pin and patches together: git add llama.cpp patches && git commit")
