"""`turbo-eval bindings`."""

from __future__ import annotations

import typer

from turbo_eval.llama import bindings, source


def register(app: typer.Typer) -> None:
    @app.command("bindings", rich_help_panel="Prepare")
    def install(
        quiet: bool = typer.Option(False, "--quiet", "-q", help="Say nothing when it was here already."),
    ) -> None:
        """Install llama-cpp-python for the metrics that generate text: greedy and needle.

        Without a llama.cpp of its own, so nothing is compiled: it loads the libraries of our builds.

        turbo-eval bindings
        """

        made = bindings.install()
        if made or not quiet:
            print(f"{source.SDIST_REQUIREMENT} {'installed' if made else 'is installed already'}")
