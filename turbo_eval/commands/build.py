"""`turbo-eval build`: compile what build/src holds."""

from __future__ import annotations

import time

import typer


def register(app: typer.Typer) -> None:
    @app.command("build", rich_help_panel="Prepare")
    def compile_(
        backend: str = typer.Argument("cpu", help="cpu, metal or cuda."),
        jobs: int | None = typer.Option(
            None, "--jobs", "-j", help="Compilers at a time; all cores if not given."
        ),
        cuda_archs: str = typer.Option(
            "", help="CUDA architectures, e.g. '86-real;90-real'; those of this machine's GPU if not given."
        ),
        option: list[str] = typer.Option([], "--option", "-D", help="A further CMake option KEY=VALUE."),
    ) -> None:
        """Build the patched llama.cpp for one backend into build/BACKEND/bin.

        Does nothing when neither sources nor options changed since the last time.

          turbo-eval build cpu

          turbo-eval build cuda --cuda-archs 90-real
        """
        from turbo_eval import build as builds

        started = time.monotonic()
        made, worked = builds.build(backend, jobs=jobs, cuda_archs=cuda_archs, extra=option)
        spent = f"in {time.monotonic() - started:.0f} s" if worked else "already"
        edits = ", with edits that the series does not hold" if made.dirty else ""
        print(f"{backend} build of tree {made.tree[:12]} is in {made.bin_dir} {spent}{edits}")
