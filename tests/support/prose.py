"""Reading ease of a page: its paragraphs, sentences, commands, and where it first uses a term."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

MOST_WORDS, MOST_SENTENCES = 35, 5
_FENCE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items, without code blocks, tables, headings and comments; links are their text."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("\n", text), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith(("|", "#"))]
        plain = _LINK.sub(r"\1", " ".join(" ".join(lines).split())).removeprefix("- ")
        if plain:
            yield plain


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences: they end with . ! or ? before a blank and no small letter, or at its end."""
    return [s for s in re.split(r"(?<=[.!?])[*_)]*\s+(?![a-z])", paragraph) if s]


def hard(text: str) -> list[str]:
    """Sentences and paragraphs of a page that are too long."""
    found = []
    for paragraph in paragraphs(text):
        own = sentences(paragraph)
        if len(own) > MOST_SENTENCES:
            found.append(f"{len(own)} sentences: {paragraph[:60]}…")
        found += [f"{len(s.split())} words: {s[:60]}…" for s in own if len(s.split()) > MOST_WORDS]
    return found


def unexplained(text: str, terms: Mapping[str, str]) -> list[str]:
    """Terms whose first use on a page is no link to the glossary, nor after a link to their entry there. Code
    and headings are no use of a word.

    Args:
        terms: each with the anchor of its entry, as `terms` gives them.
    """
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("\n", text), flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`|!\[[^\]]*\]|^#.*$", "", text, flags=re.MULTILINE)
    links = [
        (m.start(), m.end(), m[1]) for m in re.finditer(r"\[[^\]]*\]\([^)]*glossary\.md#([^)]*)\)", text)
    ]
    others = r"\[[^\]]*\]\((?![^)]*glossary\.md#)[^)]*\)|\]\([^)]*\)"  # names of other pages, and addresses
    skipped = [(m.start(), m.end()) for m in re.finditer(others, text)]
    found = []
    for term, anchor in terms.items():
        uses = re.finditer(rf"(?<![\w-]){re.escape(term)}s?(?![\w-])", text, re.IGNORECASE)
        places = (use.start() for use in uses)
        first = next((at for at in places if not any(a <= at < b for a, b in skipped)), None)
        told = (a for a, b, entry in links if entry == anchor or (first is not None and a <= first < b))
        if first is not None and not any(a <= first for a in told):
            found.append(term)
    return found


def terms(glossary: str) -> dict[str, str]:
    """The headings of the glossary, one by one where one holds several, each with its anchor."""
    headings = re.findall(r"^## (.+)$", glossary, re.MULTILINE)
    anchors = [re.sub(r"[, ]+", "-", heading.lower()) for heading in headings]
    return {t: anchor for heading, anchor in zip(headings, anchors, strict=True) for t in heading.split(", ")}


def commands(text: str) -> list[str]:
    """Commands of a page: of its code blocks, continued lines joined, `&&` parted, output left out; and those
    in a line of text that begin with the program's name or make."""
    plain = _FENCE.sub("\n", text)
    inline = re.findall(r"`(?:\.venv/bin/)?((?:turbo-eval|make|apt-get)(?: [^`]*)?)`", plain)
    found = [" ".join(shlex.split(command)) for command in inline]
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True) if _begins(part) else []
                if words:
                    found.append(" ".join(part.split()) if words[0] == "curl" else " ".join(words))
    return list(dict.fromkeys(found))


def _begins(line: str) -> bool:
    return bool(re.match(r"\s*(turbo-eval|make|git|cd|source|curl|pipx|apt-get|build/)\b", line))
