"""A folder that `turbo-eval init` set up: which llama.cpp is built and judged there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from turbo_eval.errors import UsageError
from turbo_eval.util.text import meant, read_toml

FOLDER = "turbo-eval"
FILE = "project.toml"
# What `init` writes is not compiled into anything: editing it makes no other build.
BESIDE_THE_SOURCES = (FOLDER, ".github/workflows/turbo-eval.yml", ".github/workflows/turbo-eval-run.yml")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockSize(_Strict):
    """A cache type of somebody else's: values in a block, and its bytes."""

    block: int = Field(ge=1)
    block_bytes: int = Field(ge=1)


class Settings(_Strict):
    """project.toml.

    Attributes:
        source: "pinned", upstream at this package's pin; "here", the checkout the project lies in.
        patches: this package's series on top of it, or none.
        types: cache types that only this source has, by name.
    """

    source: Literal["pinned", "here"] = "pinned"
    patches: bool = True
    types: dict[str, BlockSize] = {}


@dataclass(frozen=True)
class Project:
    """`folder` is what `init` was given; everything of ours lies below `root`."""

    folder: Path
    settings: Settings

    @property
    def root(self) -> Path:
        return self.folder / FOLDER

    @property
    def here(self) -> bool:
        """Is the checkout that the project lies in what is evaluated?"""
        return self.settings.source == "here"


def is_project(folder: Path) -> bool:
    """Did `init` set this folder up?"""
    return (folder / FOLDER / FILE).is_file()


def load(folder: Path) -> Project:
    """Read DIR/turbo-eval/project.toml.

    Raises:
        UsageError: it is missing, no TOML, or wrong.
    """
    file = folder / FOLDER / FILE
    data = read_toml(file, missing=f"run `turbo-eval init {folder}`")
    try:
        return Project(folder, Settings.model_validate(data))
    except ValidationError as error:
        # a misspelt key is also a missing one; the first says more
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = BlockSize.model_fields if len(first["loc"]) > 1 else Settings.model_fields
            step = meant(str(first["loc"][-1]), known)
            raise UsageError(f"{file}: unknown key {where!r}", step) from None
        raise UsageError(f"{file}: {where}: {first['msg']}", "correct it") from None
