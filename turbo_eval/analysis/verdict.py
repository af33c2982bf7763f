"""A gate's outcome as Markdown: for the comment on a pull request and the summary of a CI job."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_eval.analysis import page
from turbo_eval.analysis.gate import GateResult
from turbo_eval.analysis.summary import by_setting
from turbo_eval.analysis.table import render_markdown
from turbo_eval.sweep.spec import GateSpec


def mark(backend: str) -> str:
    """First line of the text, invisible once rendered: by it a comment of an earlier run is found again."""
    return f"<!-- turbo-eval {backend} -->"


def render_verdict(spec: GateSpec, outcome: GateResult) -> str:
    """Heading, a sentence for each check that is not met, the table, and the checks that pass folded away."""
    environment = page.environment()
    environment.filters["literal"] = _escaped
    text = environment.get_template("verdict.md.j2").render(
        mark=mark(spec.sweep.backend),
        backend=spec.sweep.backend,
        headline=_headline(outcome),
        regressions=outcome.regressions,
        incomplete=outcome.incomplete,
        tables=[render_markdown(group) for _, group in by_setting(outcome.rows)],
        passed=outcome.passed,
    )
    return text.rstrip() + "\n"


def _headline(outcome: GateResult) -> str:
    if outcome.regressions:
        return f"{_count(outcome.regressions, 'check')} failed"
    if outcome.incomplete:
        return "no verdict, something is missing"
    return "passed"


def _count(what: Sequence[str], name: str) -> str:
    return f"{len(what)} {name}{'' if len(what) == 1 else 's'}"


def _escaped(sentence: str) -> str:
    """`*` stands in patterns, `<` in what a tool said; neither is markup here."""
    return sentence.replace("\\", "\\\\").replace("*", "\\*").replace("<", "&lt;")
