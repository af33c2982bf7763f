"""Wiring only: one typer app, one `register(app)` a command module, one way to fail."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import typer

from turbo_eval.errors import TurboEvalError
from turbo_eval.util.terminal import speak_plainly

# Order is the order in --help. A module is added here when it exists.
COMMANDS: tuple[str, ...] = (
    *("init", "doctor", "source", "patches", "build", "bindings", "models", "corpora"),
    *("plan", "sweep", "worker", "table", "gate", "show", "results", "recommend", "bench", "report"),
    *("selftest", "compare", "bisect", "probe", "calibrate", "anchor", "codebooks"),
)

# What a full, read-only or wrongly named disk answers; anything else is a bug and shows itself.
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
}

app = typer.Typer(
    name="turbo-eval",
    no_args_is_help=True,
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
        from turbo_eval.llama.provenance import harness

        print(f"turbo-eval {harness()} ({_made_for()})")
        raise typer.Exit


def _made_for() -> str:
    """Which llama.cpp and which patches: what makes one turbo-eval build another tree than the next."""
    from turbo_eval.llama import patches, source

    series, digest = patches.read_series(), patches.series_sha256()
    return f"llama.cpp {source.shipped_pin()[:12]}, {len(series)} patches {digest[:12]}"


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


for _name in COMMANDS:
    import_module(f"turbo_eval.commands.{_name}").register(app)


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
