"""Tables in README and docs that are written from records.

They stand between `<!-- turbo-eval: NAME -->` and `<!-- turbo-eval: end -->`. What is between is replaced;
everything else is left as it is. The records are those of results/reference/: a results folder as
`turbo-eval sweep` writes it for each thing that was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.analysis.written.blocks import BLOCKS
from turbo_eval.errors import UsageError
from turbo_eval.util.files import atomic_write
from turbo_eval.util.text import meant

END = "<!-- turbo-eval: end -->"
_MARK = re.compile(r"^<!-- turbo-eval: ([\w-]+) -->$", re.M)
_CODE = re.compile(r"^```.*?^```", re.M | re.S)


@dataclass(frozen=True)
class Written:
    """A text and what it should be; `differing` names the blocks that are not what the records give."""

    path: Path
    text: str
    wanted: str
    differing: tuple[str, ...]


def texts(root: Path) -> Iterator[Path]:
    """The files that may hold blocks."""
    yield from (path for path in [root / "README.md"] if path.is_file())
    yield from sorted((root / "docs").rglob("*.md"))


def written(root: Path, reference: Path) -> list[Written]:
    """Every text with blocks.

    Args:
        root: of the checkout.
        reference: results/reference/ with the records.

    Raises:
        UsageError: a block that nobody knows, or that has no end.
        IncompleteError: records of it are missing.
    """
    made: dict[str, str] = {}
    found = []
    for path in texts(root):
        text = path.read_text(encoding="utf-8")
        parts, differing, at = [], [], 0
        for name, start, end in _blocks(path, text):
            if name not in made:
                made[name] = BLOCKS[name](reference).rstrip("\n") + "\n"
            parts += [text[at:start], made[name]]
            differing += [name] if text[start:end] != made[name] else []
            at = end
        if parts:
            found.append(Written(path, text, "".join([*parts, text[at:]]), tuple(differing)))
    return found


def _blocks(path: Path, text: str) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of what stands between marks; marks in a code block are an example."""
    code = [found.span() for found in _CODE.finditer(text)]
    for mark in _MARK.finditer(text):
        if mark[1] == "end" or any(start < mark.start() < end for start, end in code):
            continue
        if mark[1] not in BLOCKS:
            raise UsageError(
                f"{path} has a block {mark[1]!r} that nothing writes", meant(mark[1], BLOCKS, cutoff=0.5)
            )
        start = mark.end() + 1
        end = text.find(END, start)
        following = _MARK.search(text, start)
        if end < 0 or (following is not None and following[1] != "end" and following.start() < end):
            raise UsageError(f"the block {mark[1]!r} in {path} has no end", f"put {END} after it")
        yield mark[1], start, end


def write(found: list[Written]) -> list[Path]:
    """Put the tables into the texts; returns those that changed.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    changed = [one for one in found if one.differing]
    for one in changed:
        with atomic_write(one.path) as stream:
            stream.write(one.wanted.encode())
    return [one.path for one in changed]
