"""`turbo-eval source`: fill the submodule at the pin."""

from __future__ import annotations

import typer

from turbo_eval.llama import source
from turbo_eval.util import paths


def register(app: typer.Typer) -> None:
    @app.command("source", rich_help_panel="Prepare")
    def fill(
        sdist: bool = typer.Option(
            False, "--sdist", help="Don't ask upstream; use the repository that the PyPI sdist carries."
        ),
        sdist_path: bool = typer.Option(
            False, "--sdist-path", help="Only download and verify that sdist, and print where it lies."
        ),
        quiet: bool = typer.Option(False, "--quiet", "-q", help="Say nothing when it was here already."),
    ) -> None:
        """Fill llama.cpp/ with upstream at the pinned commit.

        From upstream's git server where that answers, otherwise from the git repository inside the
        sdist of llama-cpp-python. Either way the commit id proves the content.

          turbo-eval source

          turbo-eval source --sdist
        """

        if sdist_path:
            print(source.ensure_sdist())
            return
        route = source.ensure_source(offline_route=sdist)
        if quiet and route == "present":
            return
        origin = {
            "present": "was here already",
            "upstream": "came from upstream's git server",
            "sdist": f"came from the repository inside {source.SDIST_NAME}",
            "here": "came from the checkout this project lies in",
        }[route]
        print(f"llama.cpp at {source.pin()} {origin}: {paths.submodule_dir()}")
