"""`turbo-eval build`: compile llama.cpp for one backend."""

from __future__ import annotations

import resource
import time

import typer

from turbo_eval.commands import options as o
from turbo_eval.llama import build as builds
from turbo_eval.llama.provenance import machine


def register(app: typer.Typer) -> None:
    @app.command("build", rich_help_panel="Prepare")
    def compile_(
        backend: str = typer.Argument("cpu", help="cpu, metal, cuda or vulkan."),
        jobs: int | None = typer.Option(
            None, "--jobs", "-j", help="Compilers at a time; all cores if not given."
        ),
        cuda_archs: str = typer.Option(
            "", help="CUDA architectures, e.g. '86-real;90-real'; those of this machine's GPU if not given."
        ),
        tools: str = typer.Option(
            "all",
            metavar="all|minimal|NAME[,…]",
            help="llama.cpp's tools: minimal measures; all has llama-server and llama-cli too.",
        ),
        option: list[str] = typer.Option([], "--option", "-D", help="A further CMake option KEY=VALUE."),
        patched: bool | None = typer.Option(
            None,
            "--patches/--no-patches",
            help="With turbo-eval's patches or without; if not given as turbo-eval/project.toml says.",
            show_default=False,
        ),
        key: bool = typer.Option(
            False,
            "--key",
            help="Compile nothing; print a key for caches: sources, options, compiler, machine.",
        ),
    ) -> None:
        """Build llama.cpp for one backend into build/BACKEND/bin.

        In a clone of turbo-eval that is upstream's pin with the patches; in a folder that `turbo-eval init`
        set up it is what project.toml says, fetched first where need be. Does nothing when neither
        sources nor options changed since the last time.

          turbo-eval build cpu

          turbo-eval build cuda --cuda-archs 90-real

          turbo-eval build cpu --tools minimal,llama-server

          turbo-eval build cpu --no-patches
        """

        if key:
            made_of = builds.stamp(backend, cuda_archs=cuda_archs, extra=option, patched=patched)
            print(f"{backend}-{machine().id}-{made_of[:20]}")
            return
        started, cpu = time.monotonic(), _cpu_seconds()
        made, worked = builds.build(
            backend,
            jobs=jobs,
            cuda_archs=cuda_archs,
            extra=option,
            tools=o.split(tools) or builds.ALL,
            patched=patched,
        )
        took = f"in {time.monotonic() - started:.0f} s ({_cpu_seconds() - cpu:.0f} s of CPU time)"
        spent = took if worked else "already"
        edits = ", with edits that no commit or patch holds" if made.dirty else ""
        print(f"{backend} build of tree {made.tree[:12]} is in {made.bin_dir} {spent}{edits}")


def _cpu_seconds() -> float:
    """Of the compilers so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
