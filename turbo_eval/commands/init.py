"""`turbo-eval init`: set a folder up."""

from __future__ import annotations

from pathlib import Path

import typer

from turbo_eval.setup.init import init
from turbo_eval.util.project import load


def register(app: typer.Typer) -> None:
    @app.command("init", rich_help_panel="Prepare")
    def set_up(
        folder: Path = typer.Argument(help="A checkout of a llama.cpp fork, or a new folder.", metavar="DIR"),
        patched: bool | None = typer.Option(
            None,
            "--patches/--no-patches",
            help="Evaluate with turbo-eval's patches or without (a fork: without; a new folder: with them).",
            show_default=False,
        ),
        package: str | None = typer.Option(
            None,
            help="What pip installs in CI: a requirement, or a wheel by path or URL.",
            show_default=False,
        ),
        force: bool = typer.Option(False, "--force", help="Overwrite files that are there."),
    ) -> None:
        """Set a folder up for turbo-eval: workflows for CI, a sweep with its gate, a short how-to.

        In a fork of llama.cpp its own tree is what gets built and judged. In a new folder it is upstream at
        the commit that turbo-eval is made for, with the turbo types.

          turbo-eval init ~/src/llama.cpp

          turbo-eval init demo
        """

        files = init(folder, patched=patched, package=package, force=force)
        settings = load(folder.expanduser().resolve()).settings
        what = "this checkout of llama.cpp" if settings.source == "here" else "llama.cpp at the pin"
        print(f"evaluates {what}, {'with' if settings.patches else 'without'} turbo-eval's patches")
        for file in files:
            print(f"{file.what}  {file.path.relative_to(folder.expanduser().resolve())!s:<40} {file.about}")
        if any(file.what == "kept" for file in files):
            print("kept are files that differ; --force overwrites them")
        move = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
        print(f"next: {move}turbo-eval build cpu && turbo-eval sweep turbo-eval/gates.toml")
