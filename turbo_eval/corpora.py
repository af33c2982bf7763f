"""Corpora by registry name or path: download, verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CorpusFile:
    """A text file on disk whose sha256 (hex) is known; `size` in bytes."""

    name: str
    path: Path
    sha256: str
    size: int


def resolve_corpus(name_or_path: str, *, download: bool = True) -> CorpusFile:
    """Find a corpus by registry name (downloading and verifying it first if need be) or by path.

    Raises:
        UsageError: unknown name, missing or empty file, not UTF-8, wrong sha256.
        EnvironmentProblem: the download failed, or `download` is false and it isn't here.
    """
    raise NotImplementedError
