"""Records and thresholds → sentences and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from turbo_eval.analysis.table import Summary, summarize
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.spec import Check, GateSpec


@dataclass
class GateResult:
    """Sentences by outcome, and the records they are about.

    `incomplete` outweighs nothing: a regression that is seen is said.
    """

    passed: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 with a regression, else 3 if something is missing, else 0."""
        if self.regressions:
            return 1
        return 3 if self.incomplete else 0


def run_gate(spec: GateSpec, plan: Plan, store: Store) -> GateResult:
    """Judge the records of the plan's cells, which must be of this machine and this build."""
    result = GateResult()
    records = result.records
    others = {r.cell.key_any_tree(): r for r in store.all()}
    for job in plan.jobs:
        record = store.load(job.cell)
        if record is not None:
            records.append(record)
            continue
        what = f"{job.cell.model} {job.cell.pair()} {job.cell.metric}"
        old = others.get(job.cell.key_any_tree())
        if old is not None:
            result.incomplete.append(
                f"{what}: stale, its record is of tree {old.cell.tree[:12]}, the build is of"
                f" {job.cell.tree[:12]}; run the sweep again."
            )
        else:
            result.incomplete.append(f"{what}: no record; run `turbo-eval sweep` with this config.")
    for check in spec.check:
        _run_check(check, spec, records, result)
    _unexpected_failures(spec, records, result)
    result.incomplete = list(dict.fromkeys(result.incomplete))
    return result


def _unexpected_failures(spec: GateSpec, records: Sequence[Record], result: GateResult) -> None:
    """A failed cell that no check speaks of leaves the gate incomplete, whatever the others say."""
    expected = [check for check in spec.check if check.status is not None]
    for row in summarize(records, spec.sweep.baseline):
        if row.status == "ok" or any(_matches(c, row) and c.status == row.status for c in expected):
            continue
        result.incomplete.append(f"{row.model} {row.k}:{row.v}: {row.status}, {row.detail}.")


def _run_check(check: Check, spec: GateSpec, records: Sequence[Record], result: GateResult) -> None:
    rows = summarize(records, check.baseline or spec.sweep.baseline)
    matching = [row for row in rows if _matches(check, row)]
    if not matching:
        wanted = ", ".join(check.pairs)
        result.incomplete.append(f"{check.name or wanted}: no cell matches {wanted} on {check.model}.")
    for row in matching:
        _judge(check, spec, row, result)


def _matches(check: Check, row: Summary) -> bool:
    pair = f"{row.k}:{row.v}"
    return (
        any(fnmatchcase(pair, pattern) for pattern in check.pairs)
        and fnmatchcase(row.model, check.model)
        and fnmatchcase(row.anchor, check.anchor)
    )


def _judge(check: Check, spec: GateSpec, row: Summary, result: GateResult) -> None:
    label = f"{row.model} {row.k}:{row.v}"
    if row.anchor not in ("auto", "off") or len({*(spec.sweep.anchor or ())}) > 1:
        label += f" (anchor {row.anchor})"
    if check.name:
        label = f"{check.name}: {label}"
    if check.status is not None:
        if row.status == check.status:
            result.passed.append(f"{label} is {row.status}, as expected.")
        else:
            result.regressions.append(f"{label} is {row.status}, expected was {check.status}.")
        return
    broken: list[str] = []
    held: list[str] = []
    for bound, limit in check.bounds().items():
        found = _value(bound, row)
        if isinstance(found, str):
            result.incomplete.append(f"{label}: {found}.")
            return
        sentence = (
            f"{found.text}, {'at most' if found.upper else 'at least'} {limit:g}{found.unit} is allowed"
        )
        over = found.value > limit if found.upper else found.value < limit
        (broken if over else held).append(sentence)
    if check.must_fail:
        if broken:
            result.passed.append(f"{label}: {broken[0]}; it must break this and does.")
        else:
            result.regressions.append(f"{label}: {held[0]}; it must break this and does not.")
    elif broken:
        result.regressions += [f"{label}: {sentence}." for sentence in broken]
    else:
        result.passed.append(f"{label}: {'; '.join(held)}.")


@dataclass(frozen=True)
class _Figure:
    text: str
    value: float
    unit: str = ""
    upper: bool = True


def _value(bound: str, row: Summary) -> _Figure | str:
    """The figure that a bound speaks of, or why there is none."""
    if bound in ("max_ppl", "max_delta_pct"):
        if row.ppl is None:
            return f"no perplexity, the cell is {row.status}" + (f" ({row.detail})" if row.detail else "")
        if bound == "max_ppl":
            return _Figure(f"perplexity {row.ppl:.4f}", row.ppl)
        if row.delta_pct is None:
            return "there is no baseline to compare with"
        return _Figure(f"ΔPPL {row.delta_pct:+.3f} %", row.delta_pct, " %")
    if bound in ("max_kld", "min_same_top_pct"):
        record = row.get("kld")
        if record is None or record.kld is None:
            return "no KL divergence is on record"
        kld = record.kld
        if bound == "max_kld":
            return _Figure(f"KL divergence {kld.mean:.6f}", kld.mean)
        return _Figure(f"same top token {kld.same_top_pct:.3f} %", kld.same_top_pct, " %", upper=False)
    decode = next((r.decode for r in row.records if r.decode is not None), None)
    if decode is None:
        return "no decode-path number is on record"
    delta = abs(decode.delta_pct)
    return _Figure(f"decode path {delta:.3f} % off the batched one", delta, " %")
