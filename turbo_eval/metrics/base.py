"""What a metric is to the rest: its settings, what it is compared with, how it is measured and shown.

A new one is a module beside this with a subclass, and a line in the registry of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store
from turbo_eval.util import numbers as n

# Called as work goes on: chunks done, chunks in all, running perplexity.
OnProgress = Callable[[int, int | None, float | None], None]


class Options(BaseModel):
    """A metric's settings: the table of its name in a sweep's TOML."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Job:
    """A cell and where its inputs lie. `anchor` is the value for --kv-anchor, None: no flag.

    `profile`: the file that the cell's types come from.
    `writes_base`: the run also leaves the base that KL divergences of this sweep are taken against.
    """

    cell: Cell
    model: ModelFile
    corpus: CorpusFile
    anchor: str | None
    writes_base: bool = False
    profile: Path | None = None


@dataclass(frozen=True)
class Bench:
    """What every measurement needs beside its job."""

    build: Build
    provenance: Provenance
    store: Store
    threads: int
    timeout: float | None


@dataclass(frozen=True)
class Extent:
    """What a sweep asks of every metric: `chunks` of text, `ubatch` tokens, and the metric's own settings."""

    chunks: int
    ubatch: int
    options: Options | None


@dataclass(frozen=True)
class Column:
    """A figure in tables. `value` reads a record of the metric; `pattern` is how people see it."""

    heading: str
    value: Callable[[Record], Any]
    pattern: str = "{}"


@dataclass(frozen=True)
class Bound:
    """A bound that a gate's check may set on a record of the metric.

    Attributes:
        key: in TOML, e.g. "max_kld".
        kind: what a bound may be, one of util.numbers.
        value: the figure; None: the record has none.
        words: the figure in a sentence.
        unit: of figure and bound.
        upper: the figure may be at most the bound; False: at least.
        absent: the sentence where no record has the figure.
    """

    key: str
    kind: Any
    value: Callable[[Record], float | None]
    words: Callable[[Record], str]
    absent: str
    unit: str = ""
    upper: bool = True


class Metric:
    """One metric; the answers here are those of a plain perplexity run.

    Attributes:
        name: as users and records spell it.
        options: its settings, if it has any.
        batched: it sends the text through in batches and so yields a perplexity.
        per_token: it follows from figures of each token, so llama-kv-eval can measure it.
        covers: metrics whose figures its cells hold too; they are dropped beside it.
        needs: metrics of which one has to be in the plan before it; the first is added if none is.
        own_exact: it is compared with an f16/f16 cell of its own, see `exact`.
        columns: its figures in tables, beside those of perplexity.
        bounds: what a gate can ask of it.
        docs: where its method is described, in docs/explanation/method.md.
    """

    name: str = ""
    options: type[Options] | None = None
    batched: bool = False
    per_token: bool = False
    covers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    own_exact: bool = False
    columns: tuple[Column, ...] = ()
    bounds: tuple[Bound, ...] = ()
    docs: str = ""

    # -- plan ----------------------------------------------------------------------------------------

    def lay_out(self, extent: Extent) -> dict[str, Any]:
        """`chunks`, `ubatch` and `options` of its cells."""
        options = extent.options.model_dump(mode="json") if extent.options is not None else {}
        return {"chunks": extent.chunks, "ubatch": extent.ubatch, "options": options}

    def exact(self, cell: Cell) -> Cell | None:
        """The f16/f16 cell of this metric that `cell` cannot be judged without; None: it needs none.

        It is planned before `cell` where the sweep does not have it.
        """
        return None

    def references(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells whose records `measure` is handed, as far as they are on record, the preferred first:
        they come before `cell` in a plan, and a machine that runs it alone must be given them."""
        exact = self.exact(cell)
        return (exact,) if exact is not None and exact != cell else ()

    def seconds(self, job: Job, threads: int) -> float:
        """Rough duration of a cell where none is on record."""
        parameters = job.model.size * 8 / 5  # about five bits a weight
        return 2.0 + job.cell.ctx * job.cell.chunks * 2 * parameters / (threads * 3e10)

    # -- run -----------------------------------------------------------------------------------------

    def measure(
        self, job: Job, bench: Bench, on_progress: OnProgress, references: Sequence[Record]
    ) -> Record:
        """Run a cell and judge it.

        Args:
            references: records of `self.references(job.cell)` that have a number, the preferred first.

        Raises:
            EnvironmentProblem: disk full, tool missing: nothing further could succeed.
            KeyboardInterrupt: after ending the process; nothing is recorded.
        """
        raise NotImplementedError

    # -- show ----------------------------------------------------------------------------------------

    def words(self, record: Record) -> str:
        """The record's figure in a few words."""
        return f"PPL {record.ppl:.4f} ± {record.ppl_err:.4f}"


def figure(name: str, heading: str, pattern: str = "{}") -> Column:
    """A column of a metric of one's own: `record.figures[name]`."""
    return Column(heading, lambda record: record.figures.get(name), pattern)


__all__ = ["Bench", "Bound", "Column", "Extent", "Job", "Metric", "OnProgress", "Options", "figure", "n"]
