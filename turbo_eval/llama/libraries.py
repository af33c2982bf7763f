"""The shared libraries of a build."""

from __future__ import annotations

import sys
from pathlib import Path


def library(folder: Path, name: str) -> Path:
    """Path of a library as the linker of this system names it, e.g. `library(bin_dir, "ggml-base")`."""
    return folder / f"lib{name}{'.dylib' if sys.platform == 'darwin' else '.so'}"
