"""Reading ease of a page: its paragraphs, sentences, commands, and where it first uses a term."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

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


def unexplained(text: str, terms: list[str]) -> list[str]:
    """Terms of the glossary whose first use on a page is not a link to it. Code is no use of a word."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("\n", text), flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`|!\[[^\]]*\]", "", text)
    links = [(m.start(), m.end()) for m in re.finditer(r"\[[^\]]*\]\([^)]*glossary\.md#[^)]*\)", text)]
    addresses = [(m.start(), m.end()) for m in re.finditer(r"\]\([^)]*\)", text)]
    found = []
    for term in terms:
        for use in re.finditer(rf"(?<![\w-]){re.escape(term)}s?(?![\w-])", text, re.IGNORECASE):
            if any(a <= use.start() < b for a, b in addresses):
                if any(a <= use.start() < b for a, b in links):
                    break
                continue
            if not any(a <= use.start() < b for a, b in links):
                found.append(term)
            break
    return found


def terms(glossary: str) -> list[str]:
    """The headings of the glossary."""
    return [t for heading in re.findall(r"^## (.+)$", glossary, re.MULTILINE) for t in heading.split(", ")]


def commands(text: str) -> list[str]:
    """Commands of a page: of its code blocks, continued lines joined, `&&` parted, output left out; and those
    in a line of text that begin with the program's name or make."""
    plain = _FENCE.sub("\n", text)
    inline = re.findall(r"`((?:turbo-eval|make|apt-get)(?: [^`]*)?)`", plain)
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
