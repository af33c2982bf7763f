"""Words for people: what a mistyped name may have meant, and TOML that is wrong."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from turbo_eval.errors import UsageError


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that is most like `name`, "" if none is. `cutoff` from 0, anything, to 1, the same."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def meant(name: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """Advice on an unknown name; where nothing is like it `otherwise`, or else all that is known."""
    names = list(known)
    near = nearest(name, names, cutoff)
    return f"perhaps you meant {near!r}" if near else otherwise or f"known are {', '.join(names)}"


def read_toml(path: Path, *, what: str = "", missing: str = "") -> dict[str, Any]:
    """Read a TOML file.

    Args:
        what: stands before its name in sentences, e.g. "config ".
        missing: the step to take where it is not there.

    Raises:
        UsageError: missing, unreadable, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{what}{path} does not exist", missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what}{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{what}{path} is not TOML: {error}", "correct it") from None
