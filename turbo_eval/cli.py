"""Wiring only: one typer app, one `register(app)` a command module, one way to fail."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from turbo_eval.errors import TurboEvalError
from turbo_eval.util.terminal import speak_plainly

_PREPARE = "Prepare"
# Name → panel of --help and the first sentence of the command's own help (a test compares them), in the
# order of --help. Each is a module of commands/, loaded when it is called: a new one is a module and a line.
COMMANDS: dict[str, tuple[str | None, str]] = {
    "plan": (None, "Show the cells of a sweep without running them."),
    "sweep": (None, "Measure K/V cache-type pairs and write one record a cell."),
    "worker": (
        None,
        "Measure cells for sweeps on other machines, one at a time, until the scheduler goes.",
    ),
    "table": (None, "Compare what is on record: K × V with ΔPPL, error bars, bits and sizes."),
    "position": (None, "Show KL divergence by context length and by distance from the start of the context."),
    "gate": (None, "Judge the records of this machine and build against a config's checks."),
    "show": (None, "Print a record and the command that reproduces it by hand."),
    "recommend": (None, "Name the cheapest K/V pair for a model that is certainly within a bound."),
    "serve": (None, "Run llama-server with a cache that was measured, and say what to expect of it."),
    "bench": (
        None,
        "Measure speed, interleaved with f16 of the same build: over depth, of sequences, of drafts.",
    ),
    "report": (None, "Write index.html (self-contained), report.md and figures/ (SVG, PNG)."),
    "selftest": (
        None,
        "Check a build's turbo types and kernels against references that share no code with it.",
    ),
    "compare": (
        None,
        "Compare two sets of records cell by cell: machines, builds, pins, backends, settings.",
    ),
    "bisect": (
        None,
        "Find the first revision at which a cell becomes bad: build, run the cell, tell `git bisect`.",
    ),
    "probe": (None, "Find the first layer and tensor where a cache goes wrong."),
    "codebooks": (
        None,
        "Codebooks of our types, their MSE on unit Gaussians and the limits they stand against.",
    ),
    "results": (None, "List, prune, export and submit what is on record."),
    "inspect": (
        None,
        "What cache types, K anchor and exact window would do with a model, without running it.",
    ),
    "anchor": (None, "What the K anchor is about and what it does."),
    "init": (
        _PREPARE,
        "Set a folder up for turbo-eval: workflows for CI, a sweep with its gate, a short how-to.",
    ),
    "doctor": (_PREPARE, "What is here, what is missing, and the command that fixes it."),
    "source": (_PREPARE, "Fill llama.cpp/ with upstream at the pinned commit."),
    "build": (_PREPARE, "Build llama.cpp for one backend into build/BACKEND/bin."),
    "bindings": (
        _PREPARE,
        "Install llama-cpp-python for the metrics that generate text: greedy and needle.",
    ),
    "calibrate": (_PREPARE, "Measure Q and K of a model on a text, for the K anchor."),
    "tune": (
        _PREPARE,
        "Find the cache types of each layer for a model, prove them, write a profile for llama.cpp.",
    ),
    "patches": (_PREPARE, "The patch series: what this fork adds to llama.cpp."),
    "models": (_PREPARE, "Models by name (configs/models.toml) or path."),
    "corpora": (_PREPARE, "Texts by name (configs/corpora.toml) or path."),
}

# What a full, read-only or wrongly named disk answers; anything else is a bug and shows itself.
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
}


class _Commands(TyperGroup):
    """The commands by name; --help lists them without loading one."""

    _listing = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # typer looks here for what a mistyped name may have meant
        self.commands = {
            name: TyperCommand(name, help=text, rich_help_panel=panel)
            for name, (panel, text) in COMMANDS.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return self.commands[cmd_name] if self._listing else load(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def load(name: str) -> Any:
    """The command as typer made it of its module."""
    alone = typer.Typer(rich_markup_mode="rich")
    import_module(f"turbo_eval.commands.{name}").register(alone)
    return typer.main.get_group(alone).commands[name]


app = typer.Typer(
    name="turbo-eval",
    cls=_Commands,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Build a pinned llama.cpp with turbo3/turbo4 KV-cache types and measure what they cost.

    [bold]From nothing to a table:[/bold] make demo

    [bold]By example[/bold]

      turbo-eval doctor                     what is missing, and what fixes it

      turbo-eval sweep configs/demo.toml    perplexity of each K/V pair

      turbo-eval sweep --model my.gguf --pairs q8_0:q8_0,q8_0:turbo3

      turbo-eval table --format markdown    compare what is on record

      turbo-eval gate configs/gates.toml    an exit code for CI

    [bold]Exit codes[/bold]  0 pass · 1 regression · 2 bad usage or config · 3 incomplete · 4 environment
    """,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from turbo_eval.llama.provenance import harness  # noqa: PLC0415 --help does without

        print(f"turbo-eval {harness()} ({_made_for()})")
        raise typer.Exit


def _made_for() -> str:
    """Which llama.cpp and which patches: what makes one turbo-eval build another tree than the next."""
    from turbo_eval.llama import patches, source  # noqa: PLC0415 --help does without

    series, digest = patches.read_series(), patches.series_sha256()
    return f"llama.cpp {source.shipped_pin()[:12]}, {len(series)} patches {digest[:12]}"


def _greet() -> None:
    from turbo_eval.setup.greet import greeting  # noqa: PLC0415 --help does without

    state, steps = greeting()
    width = max(len(step.command) for step in steps)
    print(f"{state} Next:\n")
    for step in steps:
        print(f"  {step.command:{width}}  {step.gives}")
    print("\nAll commands: turbo-eval --help")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    if context.invoked_subcommand is None:
        _greet()


def main() -> None:
    """Console script: one sentence on stderr for every foreseen error, no traceback.

    `TURBO_EVAL_DEBUG=1` lets the traceback through.
    """
    speak_plainly()
    try:
        # Typer's own messages come as exceptions then: boxes of several lines otherwise.
        code = app(standalone_mode=False)
    except TurboEvalError as error:
        _fail(error, error.sentence(), error.exit_code)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = error.filename or "the disk"
        step = "free space, or set TURBO_EVAL_CACHE or TURBO_EVAL_RESULTS to another place"
        _fail(error, f"{place} cannot be used ({error.strerror}); {step}.", 4)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted.", _INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors have it, under whatever name they come
            raise
        _refuse(error)
    if code == _INTERRUPTED:
        print("turbo-eval: interrupted.", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


_INTERRUPTED = 130


def _refuse(error: Any) -> NoReturn:
    """A command line that typer does not understand."""
    if type(error).__name__ == "NoArgsIsHelpError":  # it is a help page
        error.show()
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "turbo-eval"
    message = " ".join(error.format_message().split()).rstrip(".")
    _fail(error, f"{message[:1].lower()}{message[1:]}; see `{command} --help`.", error.exit_code)


def _fail(error: BaseException, sentence: str, code: int) -> NoReturn:
    if os.environ.get("TURBO_EVAL_DEBUG") == "1":
        raise error
    print(f"turbo-eval: {sentence}", file=sys.stderr)
    sys.exit(code)
