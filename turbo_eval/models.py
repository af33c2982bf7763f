"""Models by registry name or path: download, verify, describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbo_eval.gguf_info import GgufInfo


@dataclass(frozen=True)
class ModelFile:
    """A model on disk whose sha256 (hex) is known; `size` in bytes."""

    name: str
    path: Path
    sha256: str
    size: int
    gguf: GgufInfo


def resolve_model(name_or_path: str, *, download: bool = True) -> ModelFile:
    """Find a model by registry name (downloading and verifying it first if need be) or by path.

    Raises:
        UsageError: unknown name, missing, truncated or non-GGUF file, wrong sha256.
        EnvironmentProblem: the download failed, or `download` is false and it isn't here.
    """
    raise NotImplementedError
