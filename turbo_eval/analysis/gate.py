"""Records and thresholds → sentences and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from turbo_eval.analysis.summary import Summary, said_of_reference, summarize
from turbo_eval.evidence.paired import Decision
from turbo_eval.llama.build import Build
from turbo_eval.metrics import bounds as metric_bounds
from turbo_eval.records.pairing import ERROR_RATE
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.records.reference import Pair, References
from turbo_eval.records.store import Store
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.run import Reporter
from turbo_eval.sweep.spec import Check, GateSpec
from turbo_eval.sweep.until import run_until_decided


@dataclass
class GateResult:
    """Sentences by outcome, the records they are about and the rows that these make.

    A gate with a regression fails, even if other cells are missing (`incomplete`). `judged` says what the
    verdict is about: which model, text, context, build, and what is compared with what.
    """

    judged: list[str] = field(default_factory=list)

    passed: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    rows: list[Summary] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 with a regression, else 3 if something is missing, else 0."""
        if self.regressions:
            return 1
        return 3 if self.incomplete else 0


def settle(
    spec: GateSpec,
    build: Build,
    provenance: Provenance,
    store: Store,
    live: Callable[[Plan], AbstractContextManager[Reporter]],
    most: int,
) -> list[Record]:
    """Add chunks to the pairs of `equivalent_within` and `not_worse_than` that the text leaves open, up to
    `most`; returns the longest record of each. Checks on profiles are left as they are.

    Raises:
        UsageError, InterruptedSweepError, EnvironmentProblem: as `run_until_decided`.
    """
    found: dict[tuple[str, str], Record] = {}
    for check in spec.check:
        pairs = tuple(p for p in spec.sweep.pairs if any(fnmatchcase(":".join(p), c) for c in check.pairs))
        models = tuple(m for m in spec.sweep.models if fnmatchcase(m, check.model))
        if not pairs or not models:
            continue
        update = {"pairs": pairs, "models": models, "profiles": ()}
        sweep = spec.sweep.model_copy(update=update | {"against": check.against or spec.sweep.against})
        for test, margin in check.tests().items():

            def enough(decision: Decision, test: str = test, margin: float = margin) -> bool:
                return _passes(test, margin, decision) is not None

            result = run_until_decided(
                sweep, build, provenance, store, live, margin=margin, most=most, enough=enough
            )
            for cache, one in result.judged.items():
                known = found.get((cache, sweep.model_dump_json(include={"against"})))
                if known is None or one.chunks >= known.cell.chunks:
                    found[cache, sweep.model_dump_json(include={"against"})] = one.record
    return list({record.key: record for record in found.values()}.values())


def run_gate(
    spec: GateSpec, plan: Plan, store: Store, behind: str = "", settled: Sequence[Record] = ()
) -> GateResult:
    """Judge the records of the plan's cells, which must be of this machine and this build.

    Args:
        behind: why the build itself is stale, "" if it isn't.
        settled: what `settle` returned; paired tests are read from these.
    """
    result = GateResult()
    if behind:
        result.incomplete.append(f"stale: {behind.rstrip('.')} and run the sweep again.")
    _collect(plan, store, result)
    sweep = spec.sweep
    result.rows = _rows(result, store, sweep.against, sweep.reference)
    result.judged = _judged(result.rows)
    if result.records:  # with nothing on record every check would say so once more
        for check in spec.check:
            against = check.against or sweep.against
            rows = result.rows if against == sweep.against else _rows(result, store, against, True)
            if not settled or not check.tests() or check.profile is not None:
                _run_check(check, spec, rows, result)
                continue
            longer = summarize(settled, references=References.in_store(store, against))
            _run_check(check.model_copy(update=dict.fromkeys(check.bounds())), spec, longer, result)
            if check.bounds():
                _run_check(check.model_copy(update=dict.fromkeys(check.tests())), spec, rows, result)
    _unexpected_failures(spec, result)
    result.incomplete = list(dict.fromkeys(result.incomplete))
    return result


def _rows(result: GateResult, store: Store, against: Pair | None, wanted: bool) -> list[Summary]:
    references = References.in_store(store, against, wanted=wanted)
    return summarize(result.records, references=references)


def _judged(rows: Sequence[Summary]) -> list[str]:
    """What the verdict is about, a line for each setting."""
    lines = []
    for row in {(r.model, r.corpus, r.ctx, r.chunks, r.anchor): r for r in rows}.values():
        lines.append(
            f"{row.model} on {row.corpus}, {row.chunks} chunks of {row.ctx} tokens, {row.backend}, anchor"
            f" {row.anchor}, build {row.tree[:12]}; {said_of_reference([row])}"
        )
    return lines


def _collect(plan: Plan, store: Store, result: GateResult) -> None:
    """The records of the plan's cells; what is missing is said in one sentence for each reason."""
    others = {r.cell.key_any_tree(): r for r in store.all()}
    missing: list[str] = []
    stale: dict[str, list[str]] = {}
    for job in plan.jobs:
        other = job.cell.model_copy(
            update={"engine": "llama-perplexity"}
        )  # as --jobs and older versions have
        record = store.load(job.cell) or store.load(other)
        if record is not None:
            result.records.append(record)
            continue
        what = f"{job.cell.model} {job.cell.named()} {job.cell.metric}"
        old = others.get(job.cell.key_any_tree())
        damaged = store.unreadable(job.cell)
        if damaged is not None:
            result.incomplete.append(f"{what}: its record {damaged} cannot be used; run the sweep again.")
        elif old is not None:
            stale.setdefault(old.cell.tree, []).append(what)
        else:
            missing.append(what)
    tree = plan.build.tree[:12]
    for old_tree, cells in stale.items():
        result.incomplete.append(
            f"stale: {_listed(cells)} on record {'is' if len(cells) == 1 else 'are'} of tree {old_tree[:12]},"
            f" the build is of {tree}; run the sweep again."
        )
    if missing:
        which = "none of the cells has a" if len(missing) == len(plan.jobs) else f"{_listed(missing)}: no"
        result.incomplete.append(
            f"{which} record of this machine and build {tree}; run `turbo-eval sweep` with this config."
        )


_NAMED = 4


def _listed(cells: Sequence[str]) -> str:
    more = f" and {len(cells) - _NAMED} more cells" if len(cells) > _NAMED else ""
    return ", ".join(cells[:_NAMED]) + more


def _unexpected_failures(spec: GateSpec, result: GateResult) -> None:
    """A failed cell that no check speaks of leaves the gate incomplete, whatever the others say."""
    expected = [check for check in spec.check if check.status is not None]
    for row in result.rows:
        if row.status == "ok" or any(_matches(c, row) and c.status == row.status for c in expected):
            continue
        result.incomplete.append(f"{row.model} {row.name.replace('/', ':', 1)}: {row.status}, {row.detail}.")


def _run_check(check: Check, spec: GateSpec, rows: Sequence[Summary], result: GateResult) -> None:
    matching = [row for row in rows if _matches(check, row)]
    if not matching:
        wanted = ", ".join(check.pairs) or f"profile {check.profile}"
        result.incomplete.append(f"{check.name or wanted}: no cell matches {wanted} on {check.model}.")
    for row in matching:
        _judge(check, spec, row, result)


def _matches(check: Check, row: Summary) -> bool:
    pair = f"{row.k}:{row.v}"
    if (row.profile is None) != (check.profile is None):
        return False
    return (
        (any(fnmatchcase(pair, p) for p in check.pairs) or fnmatchcase(row.k, check.profile or ""))
        and fnmatchcase(row.model, check.model)
        and fnmatchcase(row.anchor, check.anchor)
        and check.recent in (None, row.window.recent)
    )


def _judge(check: Check, spec: GateSpec, row: Summary, result: GateResult) -> None:
    label = f"{row.model} {row.name.replace('/', ':', 1)}"
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
    for test, margin in check.tests().items():
        outcome, sentence = tested(test, margin, row)
        if outcome is None:
            result.incomplete.append(f"{label}: {sentence}.")
            return
        (held if outcome else broken).append(sentence)
    for bound, limit in check.bounds().items():
        found = _value(bound, row)
        if isinstance(found, str):
            result.incomplete.append(f"{label}: {found}.")
            return
        sentence = (
            f"{found.text}, {'at most' if found.upper else 'at least'} {limit:g}{found.unit} is allowed"
        )
        within = found.value <= limit if found.upper else found.value >= limit
        (held if within else broken).append(sentence)
    if check.must_fail:
        if broken:
            result.passed.append(f"{label}: {broken[0]}; it must break this and does.")
        else:
            result.regressions.append(f"{label}: {held[0]}; it must break this and does not.")
    elif broken:
        result.regressions += [f"{label}: {sentence}." for sentence in broken]
    else:
        result.passed.append(f"{label}: {'; '.join(held)}.")


def tested(test: str, margin: float, row: Summary) -> tuple[bool | None, str]:
    """(does a row pass `equivalent_within` or `not_worse_than`, a sentence); None: the text does not tell."""
    if row.paired is None or row.status != "ok":
        without = _value("max_delta_pct", row)
        if isinstance(without, str):
            return None, without
        if row.status == "ok" and row.is_reference:
            return True, f"it is {row.against} itself"
        return None, f"{test} needs figures of each token, none are on record; run the sweep with --fresh"
    decision, found = row.paired.decide(margin), row.paired.interval()
    said = f"ΔPPL {found.value:+.3f} % ({found.low:+.3f} to {found.high:+.3f}) against {row.against}"
    rate = f"error rate {100 * ERROR_RATE:g} %"
    if test == "equivalent_within":
        within, beyond = f"equivalent within {margin:g} %", f"not equivalent within {margin:g} %"
    else:
        within, beyond = f"not worse than {margin:g} %", f"worse than {margin:g} %"
    good = _passes(test, margin, decision)
    if good is not None:
        return good, f"{said} is {within if good else beyond}, {rate}"
    more = decision.more_chunks
    tell = f"; about {more} more chunks would tell" if more is not None else ""
    return None, f"{said}: not decided whether it is {within}{tell}"


def _passes(test: str, margin: float, decision: Decision) -> bool | None:
    """What a decision says of `equivalent_within` or `not_worse_than`; None: nothing yet."""
    if test == "equivalent_within":
        good, bad = decision.verdict == "equivalent", decision.verdict in ("worse", "better")
    else:
        good, bad = decision.delta.high < margin, decision.verdict == "worse"
    return good if good or bad else None


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
            if not row.against:
                return "the sweep wants no reference, so there is no ΔPPL"
            return f"its reference {row.against} of the same text and build is not on record"
        doubt = f" ± {row.delta_err_pct:.3f}" if row.delta_err_pct is not None else ""
        return _Figure(f"ΔPPL {row.delta_pct:+.3f}{doubt} % against {row.against}", row.delta_pct, " %")
    _, of_metric = metric_bounds()[bound]
    for record in row.records:
        value = of_metric.value(record)
        if value is not None:
            return _Figure(of_metric.words(record), value, of_metric.unit, of_metric.upper)
    return of_metric.absent
