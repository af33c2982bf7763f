"""Children that run Python: they load what is installed, never a file that lies where we were called.

`python -m` and `-c` put the current folder before everything else on the path; a `numpy.py` there would run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def command(*arguments: str | Path) -> list[str]:
    """The command line of a Python child: this interpreter, without the current folder on its path."""
    return [sys.executable, "-P", *map(str, arguments)]


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for such a child in a folder of its own: the same for its own children, and no path in
    it that depends on the folder."""
    env = dict(os.environ if base is None else base)
    env["PYTHONSAFEPATH"] = "1"
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        if name in env:
            env[name] = os.pathsep.join(
                str(Path(part).resolve()) for part in env[name].split(os.pathsep) if part
            )
    return env
