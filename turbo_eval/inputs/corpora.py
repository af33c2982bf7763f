"""Corpora by registry name or path: download, verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import UsageError
from turbo_eval.inputs.registry import RESTORE, Entry, acquire, parse_entries
from turbo_eval.util import paths
from turbo_eval.util.files import CHUNK, file_sha256
from turbo_eval.util.text import meant, read_toml


@dataclass(frozen=True)
class CorpusFile:
    """A text file on disk whose sha256 (hex) is known; `size` in bytes."""

    name: str
    path: Path
    sha256: str
    size: int


def registry() -> dict[str, Entry]:
    """The entries of configs/corpora.toml.

    Raises:
        UsageError: it is missing or wrong.
    """
    file = paths.configs_dir() / "corpora.toml"
    table = read_toml(file, missing=RESTORE).get("corpora")
    return parse_entries(file, table if isinstance(table, dict) else {})


def default_name() -> str:
    """The corpus that is used when none is named.

    Raises:
        UsageError: configs/corpora.toml names none, or an unknown one.
    """
    file = paths.configs_dir() / "corpora.toml"
    name, known = str(read_toml(file, missing=RESTORE).get("default", "")), registry()
    if name not in known:
        raise UsageError(f"{file}: default = {name!r} is no corpus of it", meant(name, known, cutoff=0.5))
    return name


def cached_path(name: str) -> Path:
    """Where a corpus lies once downloaded."""
    return paths.cache_dir() / "corpora" / f"{name}.txt"


def resolve_corpus(name_or_path: str, *, download: bool = True) -> CorpusFile:
    """Find a corpus by registry name (downloading and verifying it first if need be) or by path.

    Raises:
        UsageError: unknown name, missing or empty file, not UTF-8.
        EnvironmentProblem: wrong sha256, the download failed, or `download` is false and it isn't here.
    """
    known = registry()
    if name_or_path in known:
        path, digest = acquire(
            name_or_path, known[name_or_path], cached_path(name_or_path), download=download
        )
        return CorpusFile(name_or_path, path, digest, path.stat().st_size)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        looks_like_path = bool(path.suffix) or len(path.parts) > 1
        raise UsageError(
            f"there is no text file {path}" if looks_like_path else f"there is no corpus {name_or_path}",
            "check the path" if looks_like_path else f"{meant(name_or_path, known)}, or give a path",
        )
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty", "give a text that is longer than the context")
    _require_text(path)
    return CorpusFile(path.name, path.resolve(), file_sha256(path), path.stat().st_size)


def _require_text(path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as stream:
            while block := stream.read(CHUNK):
                if "\0" in block:
                    raise UsageError(f"{path} is no text: it holds NUL bytes", "give a UTF-8 text file")
    except PermissionError as error:
        raise UsageError(f"{path} may not be read", "change its permissions") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no UTF-8 text: byte {error.start} of a block is {error.object[error.start]:#04x}",
            "convert it, e.g. with `iconv -t utf-8`",
        ) from error
