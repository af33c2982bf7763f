"""Where the console script begins: Ctrl-C is quiet from the first moment on.

Loading the command line takes some tenths of a second. An interrupt in them has nothing to tidy up and ends
the process as the system does; afterwards it is an exception that commands handle.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell has it ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from turbo_eval.cli import main as run  # noqa: PLC0415 it is what takes the time

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
