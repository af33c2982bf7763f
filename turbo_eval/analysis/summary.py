"""Records → rows: what is on record for a pair in one setting, compared with its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turbo_eval.analysis.statistics import Delta, decided, delta_ppl, table_verdicts
from turbo_eval.evidence.paired import Decision
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.formats.window import Window
from turbo_eval.records.cell import CellProfile
from turbo_eval.records.pairing import ERROR_RATE, MARGIN, Paired, pairing
from turbo_eval.records.record import Record
from turbo_eval.records.reference import EXACT, Pair, References, serves


@dataclass(frozen=True)
class Summary:
    """All that is on record for one pair in one setting: a row of the table.

    `delta_pct` is against `reference` (see `turbo_eval.records.reference`); None without one: no reference,
    no verdict. `delta_err_pct` is its standard error where both ran the same tokens or chunks. `against` is
    the name of the pair compared with, "" if no comparison was wanted. `compression` is f16 size / this size,
    `status` "ok" or the first failure among the pair's cells. `paired` is what the tests of the difference
    are made of and `verdict` what they say, all rows of the table taken together; None where there is nothing
    to compare, or no figures of each token are on record.
    """

    machine: str
    model: str
    corpus: str
    ctx: int
    chunks: int
    backend: str
    anchor: str
    tree: str
    k: str
    v: str
    window: Window
    records: tuple[Record, ...]
    ppl: float | None
    ppl_err: float | None
    delta: Delta | None
    against: str
    reference: Record | None
    status: str
    detail: str
    paired: Paired | None = None
    verdict: Decision | None = None

    @property
    def delta_pct(self) -> float | None:
        return self.delta.pct if self.delta else None

    @property
    def delta_err_pct(self) -> float | None:
        """None for the reference itself, whose difference from itself has no error."""
        return self.delta.err_pct if self.delta and self.delta.paired and not self.is_reference else None

    def beyond_doubt(self, limit_pct: float) -> bool:
        """Is ΔPPL certainly on the side of the limit where it lies? With figures of each token that is read
        from the interval of the paired test, which is wider where chunks were added by looking."""
        if self.delta is None:
            return False
        if self.paired is None:
            return decided(limit_pct - self.delta.pct, self.delta.err_pct, self.delta.df)
        found = self.paired.interval()
        return not found.low <= limit_pct <= found.high

    @property
    def is_reference(self) -> bool:
        """Is this the pair that the others are compared with?"""
        return self.name == self.against and self.delta is not None

    @property
    def name(self) -> str:
        """ "K/V", with the exact window if there is one."""
        return f"{self.k}/{self.v}" + (f" window {self.window}" if self.window else "")

    @property
    def profile(self) -> CellProfile | None:
        """The KV profile that the types come from; `k` and `v` are then its name and bits."""
        return self.records[0].cell.profile

    @property
    def profile_file(self) -> Path | None:
        """Where that profile lay when it was measured; None: the types come from no profile."""
        if self.profile is None:
            return None
        argv = self.records[0].run.argv
        if "--kv-profile" in argv:
            return Path(argv[argv.index("--kv-profile") + 1])
        said = (path for r in self.records for a in r.run.argv if (path := a.partition("profile=")[2]))
        return Path(next(said, self.k))

    @property
    def bpv_k(self) -> float:
        return next((r.bpv_k for r in self.records if r.effective.k_bits), self.records[0].bpv_k)

    @property
    def bpv_v(self) -> float:
        return self.records[0].bpv_v

    @property
    def bpv(self) -> float:
        """Mean bits per value of K and V; with an exact window those of the whole cache at its size."""
        ran = (r.effective.window_bits for r in self.records if r.effective.window_bits)
        return next(ran, (self.bpv_k + self.bpv_v) / 2)

    @property
    def kv_mib(self) -> float | None:
        """MiB of the cell's context; generation has contexts of its own and doesn't count."""
        sized = (r for r in self.records if r.ok and r.cell.metric not in ("greedy", "needle"))
        return next((r.effective.kv_mib for r in sized if r.effective.kv_mib), None)

    @property
    def compression(self) -> float:
        return 16.0 / self.bpv

    def get(self, metric: str) -> Record | None:
        """The pair's good record of a metric."""
        return next((r for r in self.records if r.ok and r.cell.metric == metric), None)


def setting(record: Record) -> tuple[str, ...]:
    """What the rows of one table share: machine, model, text, build, anchor, context."""
    return (record.machine, record.cell.batched("ppl").text_key())


def summarize(
    records: Sequence[Record],
    against: Pair | None = None,
    *,
    references: References | None = None,
    margin: float = MARGIN,
) -> list[Summary]:
    """Group records by setting, pair and exact window and compare each with its reference.

    Args:
        against: the pair to compare with, where somebody named one; None: f16/f16.
        references: where references are looked up; None: among the records themselves.
        margin: change of perplexity, in percent, that verdicts are about.
    """
    references = references or References.among(records, against)
    settings: dict[tuple[str, ...], dict[_Cache, list[Record]]] = {}
    for record in records:
        cell = record.cell
        cache = (cell.k, cell.v, cell.window, cell.profile.sha256 if cell.profile is not None else "")
        settings.setdefault(setting(record), {}).setdefault(cache, []).append(record)
    rows: list[Summary] = []
    for caches in settings.values():
        ordered = sorted(caches.items(), key=lambda item: _rank(item[1][0], references.pair))
        rows += _judged([_summary(*cache[:3], group, references) for cache, group in ordered], margin)
    return rows


def _judged(rows: list[Summary], margin: float) -> list[Summary]:
    """The rows of one table with their verdicts."""
    compared = [row for row in rows if row.paired is not None and row.status == "ok"]
    verdicts = table_verdicts([row.paired for row in compared if row.paired is not None], margin)
    of = {id(row): verdict for row, verdict in zip(compared, verdicts, strict=True)}
    return [replace(row, verdict=of.get(id(row))) for row in rows]


_Cache = tuple[str, str, Window, str]  # the last is a profile's content, "": none


def _rank(record: Record, base: Pair | None) -> tuple[bool, float, float, int, int]:
    """The baseline first, then from many bits to few, then from a small window to a large one."""
    cell = record.cell
    bits = (
        (record.bpv_k, record.bpv_v)
        if cell.profile is not None
        else (cache_type(cell.k).bpv, cache_type(cell.v).bpv)
    )
    return (cell.k, cell.v) != base, -sum(bits), -bits[0], cell.recent, cell.first


def _ppl(group: Sequence[Record]) -> Record | None:
    """The record that gives a pair's perplexity: a plain run, else a KL run."""
    for metric in ("ppl", "kld"):
        for record in group:
            if record.ok and record.cell.metric == metric and record.ppl is not None:
                return record
    return None


def _summary(k: str, v: str, window: Window, group: list[Record], references: References) -> Summary:
    best = _ppl(group)
    reference = references.of(best or group[0])
    delta, tested = None, None
    if best is not None and reference is not None:
        exact = references.pair == EXACT
        # compared with itself it is no comparison, whichever of its runs is the preferred one
        own = best if (k, v) == references.pair and serves(best) == exact else reference
        delta = delta_ppl(best, own, _paired_error(group) if exact else None)
        tested = pairing(best, reference) if own is reference and best.key != reference.key else None
    failed = next((r for r in group if not r.ok), None)
    first = best or group[0]
    text = next((r for r in group if r.cell.metric in ("ppl", "kld")), first)
    return Summary(
        machine=first.machine,
        model=first.cell.model,
        corpus=first.cell.corpus,
        ctx=first.cell.ctx,
        chunks=text.cell.chunks,
        backend=first.cell.backend,
        anchor=first.cell.anchor,
        tree=first.cell.tree,
        k=k,
        v=v,
        window=window,
        records=tuple(group),
        ppl=best.ppl if best else None,
        ppl_err=best.ppl_err if best else None,
        delta=delta,
        against=references.name if references.wanted else "",
        reference=reference,
        status=failed.status if failed else "ok",
        detail=failed.detail if failed else "",
        paired=tested,
    )


def by_setting(rows: Sequence[Summary]) -> list[tuple[tuple[str, ...], list[Summary]]]:
    """Rows that may be compared with one another, together."""
    groups: dict[tuple[str, ...], list[Summary]] = {}
    for row in rows:
        groups.setdefault(setting(row.records[0]), []).append(row)
    return list(groups.items())


def _paired_error(group: list[Record]) -> float | None:
    """Standard error of PPL / PPL(f16) over the same tokens, as a KL run prints it; None where figures by
    chunk say more."""
    found = next((r for r in group if r.ok and r.kld is not None), None)
    return found.kld.ratio_err if found and found.kld and found.by_chunk is None else None


def environment(row: Summary) -> str:
    """The GGML_* and LLAMA_* variables that were in force, "" for none."""
    return " ".join(f"{name}={value}" for name, value in row.records[0].cell.env.items())


def threads(row: Summary) -> str:
    """The threads of the row's runs."""
    return "/".join(dict.fromkeys(str(r.run.threads) for r in row.records))


def said_of_reference(rows: Sequence[Summary]) -> str:
    """What the rows' ΔPPL is against, or why there is none: no table goes without it."""
    name = rows[0].against
    if not name:
        return "no reference was wanted: no ΔPPL"
    if all(row.reference is None for row in rows):
        return f"no ΔPPL: its reference {name} is not on record"
    anchors = {row.reference.cell.anchor for row in rows if row.reference is not None}
    off = ", anchor off" if name == "f16/f16" else f", anchor {'/'.join(sorted(anchors))}"
    return f"ΔPPL against {name}{off}{_said_of_verdicts(rows)}"


def _said_of_verdicts(rows: Sequence[Summary]) -> str:
    """What the verdicts of a table are about and how far they can be trusted, or why there are none."""
    compared = [row for row in rows if row.delta is not None and not row.is_reference and row.status == "ok"]
    judged = [row.verdict for row in compared if row.verdict is not None]
    if not compared:
        return ""
    if not judged:
        return "; no verdict: no figures of each token are on record (sweep --fresh with llama-kv-eval)"
    said = f"; verdict on ±{judged[0].margin_pct:g} %, {100 * ERROR_RATE:g} % error rate over the table"
    if any(verdict.more_chunks is not None for verdict in judged):
        said += ", (+n): n more chunks would tell"
    lacking = [row.name for row in compared if row.verdict is None]
    return said + (f"; none for {', '.join(lacking)}: no figures of each token" if lacking else "")
