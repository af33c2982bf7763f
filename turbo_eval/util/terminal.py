"""Output that any terminal can show."""

from __future__ import annotations

import codecs
import io
import sys

# What our tables and sentences use beyond ASCII, as it is written where the output cannot hold it.
_PLAIN = {
    "Δ": "d",
    "±": "+-",
    "×": "x",
    "–": "-",
    "−": "-",
    "…": "...",
    "·": ".",
    "→": "->",
    "—": "-",
    "≥": ">=",
    "≤": "<=",
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
}


def _spell(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    wrong = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in wrong), error.end


def speak_plainly() -> None:
    """Let stdout and stderr write in ASCII what they cannot encode, instead of failing on it."""
    codecs.register_error("turbo-eval-plain", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="turbo-eval-plain")
