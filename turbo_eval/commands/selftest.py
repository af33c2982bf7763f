"""turbo-eval selftest: codebooks, layout, rotation and attention of a build, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.formats.window import Window, sized
from turbo_eval.inputs.kv_profile import NO_CACHE, read_profile
from turbo_eval.llama.backends import backend as find_backend
from turbo_eval.selftest import Selftest
from turbo_eval.selftest.checks import ROTATIONS, all_checks
from turbo_eval.selftest.partition import LARGEST


def register(app: typer.Typer) -> None:
    app.command(
        help="""Check a build's turbo types and kernels against references that share no code with it.

        The first thing to run on new hardware; below a minute on a CPU, no model needed. Exit code
        0: all passed; 1: something is wrong, its line says what; 4: no such build or device.

          turbo-eval selftest

          turbo-eval selftest --backend cuda --failures

          turbo-eval selftest --only window --recent 256

          turbo-eval selftest --kv-profile my.kv-profile.gguf
        """
    )(selftest)


Recent = Annotated[
    str, typer.Option(metavar="auto|N", help="Exact window that is checked: the last N tokens (auto: 128).")
]
First = Annotated[str, typer.Option(metavar="auto|N", help="And the first N (auto: 4); 0 and 0: no window.")]


def _window(recent: str, first: str) -> Window:
    """The window that is checked.

    Raises:
        UsageError: no numbers, or more than the check can do in reasonable time.
    """
    sizes = o.one_window("--recent", recent), o.one_window("--first", first)
    window = sized(*sizes)
    if window.recent + window.first > LARGEST:
        raise UsageError(
            f"a window of {window} tokens takes selftest too long", f"give {LARGEST} at most in all"
        )
    return window


def _needed(profile: Path) -> set[str]:
    """The types and K:V pairs of a profile's layers, and the sizes of rotation.

    Raises:
        UsageError: it is no profile.
    """
    found = read_profile(profile).profile
    layers = [(k, v) for k, v in zip(found.k, found.v, strict=True) if NO_CACHE not in (k, v)]
    return {*(t for pair in layers for t in pair), *(f"{k}:{v}" for k, v in layers), *map(str, ROTATIONS)}


def selftest(
    backend: Annotated[str, typer.Option(help="cpu, metal, cuda or vulkan.")] = "cpu",
    device: Annotated[
        str, typer.Option(help="A ggml device by name, e.g. CUDA1, if not the backend's first.")
    ] = "",
    only: Annotated[str, typer.Option(help="Only checks with this in their name, e.g. turbo4.")] = "",
    recent: Recent = "auto",
    first: First = "auto",
    profile: Annotated[
        Path | None,
        typer.Option(
            "--kv-profile",
            help="Only what a KV profile needs: its types, and attention with each layer's K and V.",
            show_default=False,
        ),
    ] = None,
    failures: Annotated[bool, typer.Option("--failures", help="Print failing lines only.")] = False,
    bin_dir: o.BinDir = None,
) -> None:
    find_backend(backend)
    window = _window(recent, first)
    names = [name for name in all_checks(window) if only in name]
    if not names:
        raise UsageError(f"no check has {only!r} in its name", "run `turbo-eval selftest` to see them")
    if profile is not None:
        needed = _needed(profile)
        names = [name for name in names if name.split()[-1] in needed]
    console = Console(soft_wrap=True, highlight=False)
    words = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[dim]none[/dim]"}
    counts = {True: 0, False: 0, None: 0}
    test = Selftest(o.load_build(backend, bin_dir), backend, device, window)
    width = max(map(len, names))
    for line in test.run(names):
        counts[line.ok] += 1
        if line.ok is False or not failures:
            console.print(f"{words[line.ok]}  {line.name:{width}}  {escape(line.detail)}")
    refused = f", {counts[None]} pairs not offered by the device" if counts[None] else ""
    console.print(f"{counts[True]} passed, {counts[False]} failed{refused}; {escape(test.device)}")
    if counts[False]:
        raise typer.Exit(1)
