"""The metrics by name, in order of worth per second. A new one is a module here and a line in METRICS."""

from __future__ import annotations

from collections.abc import Iterable

from turbo_eval.errors import UsageError
from turbo_eval.metrics.base import Bound, Metric
from turbo_eval.metrics.decode import DecodePath
from turbo_eval.metrics.greedy import GreedyAgreement
from turbo_eval.metrics.kld import KlDivergence
from turbo_eval.metrics.needle import NeedleRetrieval
from turbo_eval.metrics.perplexity import Perplexity
from turbo_eval.metrics.retrieval import Retrieval
from turbo_eval.metrics.tasks import Tasks
from turbo_eval.metrics.trajectory import Trajectory
from turbo_eval.records.cell import Cell

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Perplexity(),
        KlDivergence(),
        DecodePath(),
        Trajectory(),
        GreedyAgreement(),
        NeedleRetrieval(),
        Retrieval(),
        Tasks(),
    )
}


def metric(name: str) -> Metric:
    """Look one up.

    Raises:
        UsageError: there is no such metric.
    """
    if name not in METRICS:
        raise UsageError(f"there is no metric {name}", f"choose of {', '.join(METRICS)}")
    return METRICS[name]


def wanted_metrics(names: Iterable[str]) -> list[Metric]:
    """Those that are asked for, in order, with what they need and without what another one covers."""
    wanted = {metric(name).name: metric(name) for name in names}
    for each in list(wanted.values()):
        if each.needs and wanted.keys().isdisjoint(each.needs):
            wanted[each.needs[0]] = metric(each.needs[0])
    covered = {name for each in wanted.values() for name in each.covers}
    return [m for m in METRICS.values() if m.name in wanted and m.name not in covered]


def references(cell: Cell) -> tuple[Cell, ...]:
    """The cells that `cell` is judged by, see `Metric.references`."""
    return metric(cell.metric).references(cell)


def bounds() -> dict[str, tuple[Metric, Bound]]:
    """What a gate can ask of records, by its key in TOML."""
    return {bound.key: (m, bound) for m in METRICS.values() for bound in m.bounds}
