"""The one function that workers run for others: text in, text out.

Dask sends functions by name (pickle's GLOBAL); this is the name that is let through (see guard).
"""

from __future__ import annotations

from collections.abc import Callable

Answer = Callable[[str, bytes], str]

_answer: Answer | None = None


def install(answer: Answer) -> None:
    """Make `answer` what this process does with requests."""
    global _answer
    _answer = answer


def call(request: str, body: bytes = b"") -> str:
    """Answer a request (JSON of wire.Request) with JSON; `body` is the bytes of a `Put`."""
    if _answer is None:
        return '{"refused": "it is a plain Dask worker; start it with `turbo-eval worker`"}'
    return _answer(request, body)
