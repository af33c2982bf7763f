"""What a sweep and its workers say to one another: JSON, checked on arrival."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record

TOPIC = "turbo-eval"  # of events: which cell began where, and how far it is
MACHINE = "machine:"  # before a machine class's id: the name of the resource that stands for it
CHUNK = 4 << 20  # bytes of a `Put`
LOG_LIMIT = 4 << 20  # characters of a cell's log that travel back, from its end


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Need(_Message):
    """A file, known by its content. `name` is for people and for the registry."""

    kind: Literal["model", "corpus", "anchor", "profile"]
    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int


class Source(_Message):
    """A build, known by its sources: `tree` is the hash, the rest says how to make it.

    `series` is the hash of the patches that are on `pin`, "" if none are.
    """

    backend: str
    tree: str
    pin: str
    series: str
    dirty: bool


class Admit(_Message):
    """May cells of this sweep run on you?"""

    op: Literal["admit"] = "admit"
    source: Source
    env: dict[str, str]
    needs: tuple[Need, ...]


class Admitted(_Message):
    """`refused`: the sentence, "" if welcome. `provenance` is that of the worker's build."""

    refused: str = ""
    provenance: Provenance | None = None


class Measure(_Message):
    """Measure a cell.

    Attributes:
        ticket: the task's name; the worker's events carry it.
        anchor: value for --kv-anchor, None: no flag, "file": the file among the needs.
        threads: wanted; the worker never uses more than it has.
        references: records that the cell is judged by.
    """

    op: Literal["measure"] = "measure"
    ticket: str
    cell: Cell
    source: Source
    needs: tuple[Need, ...]
    anchor: Literal["auto", "on", "off", "file"] | None
    threads: int | None
    timeout: float | None
    references: tuple[Record, ...]


class Measured(_Message):
    """A record with its log; or the content that is missing here; or why it cannot be run here."""

    worker: str
    record: Record | None = None
    log: str = ""
    lacking: tuple[Need, ...] = ()
    refused: str = ""


class Put(_Message):
    """A piece of a file; its bytes come beside it."""

    op: Literal["put"] = "put"
    need: Need
    offset: int


class Stored(_Message):
    """How many bytes of the file are here; `refused`: why it was thrown away."""

    worker: str
    size: int
    refused: str = ""


Request = Annotated[Admit | Measure | Put, Field(discriminator="op")]
REQUEST: TypeAdapter[Admit | Measure | Put] = TypeAdapter(Request)
_M = TypeVar("_M", bound=BaseModel)


def read(model: type[_M], text: str) -> _M | None:
    """The message in `text`; None if it is none."""
    try:
        return model.model_validate_json(text)
    except ValidationError:
        return None
