"""turbo-eval position: does the damage grow with the length of the context, or within it?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from turbo_eval.analysis import figures
from turbo_eval.analysis.picture.position import Course, courses, draw
from turbo_eval.errors import UsageError
from turbo_eval.evidence.paired import Interval
from turbo_eval.records.store import read_all
from turbo_eval.util import numbers as n
from turbo_eval.util.paths import results_dir


def register(app: typer.Typer) -> None:
    app.command(
        help="""Show KL divergence by context length and by distance from the start of the context.

        Reads the figures of each token that lie beside the records of `sweep --metrics kld` (or trajectory).
        Intervals of 95 % are over chunks; one chunk has none.

          turbo-eval sweep --model my.gguf --metrics kld --ctx 512,2048,8192 && turbo-eval position

          turbo-eval position results/reference/NAME --spans 4 --out position.svg
        """
    )(position)


def position(
    results: Annotated[list[Path] | None, typer.Argument(help="Results folders (default: results/).")] = None,
    metric: Annotated[str, typer.Option(help="kld, or trajectory.")] = "kld",
    spans: Annotated[
        int, typer.Option(parser=n.option("--spans", n.COUNT), metavar="N", help="Parts of a context.")
    ] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Draw it to this .svg or .png, too.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, nothing else.")] = False,
) -> None:
    if metric not in ("kld", "trajectory"):
        raise UsageError(f"{metric} has no figures of each token", "give kld or trajectory")
    places = results or [results_dir()]
    found = courses([(r, _folder(places, r.machine)) for r in read_all(places)], metric, spans)
    if out is not None:
        kinds = {(c.model, c.text) for c in found}
        if len(kinds) > 1:
            raise UsageError(
                f"a picture is of one model and text, and {len(kinds)} are on record", "name a folder of one"
            )
        figures.save(draw(found), out, _said(found))
    if as_json:
        print(json.dumps([_as_json(c) for c in found], indent=1, allow_nan=False))
        return
    for c in found:
        print(f"{c.model} {c.text} {c.name}, {c.chunks} × {c.ctx} tokens: KLD {_figure(c.kld)}")
        for span in c.spans:
            print(f"  {span.first:>7} to {span.last:>7} tokens before: {_figure(span.kld)}")


def _folder(places: list[Path], machine: str) -> Path:
    """The folder of a machine's records."""
    own = [place / machine for place in places if (place / machine).is_dir()]
    return own[0] if own else places[0]


def _figure(x: Interval) -> str:
    known = math.isfinite(x.low) and math.isfinite(x.high)
    return f"{x.value:.5f}" + (f" ({x.low:.5f} to {x.high:.5f})" if known else " (one chunk, no interval)")


def _said(found: list[Course]) -> str:
    first = found[0]
    return f"KL divergence over context length and position: {first.model}, {first.text}"


def _as_json(c: Course) -> dict[str, Any]:
    return {
        "model": c.model,
        "corpus": c.text,
        "cache": c.name,
        "metric": c.metric,
        "ctx": c.ctx,
        "chunks": c.chunks,
        "kld": _ends(c.kld),
        "spans": [{"first": s.first, "last": s.last, "kld": _ends(s.kld)} for s in c.spans],
    }


def _ends(x: Interval) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in (x.value, x.low, x.high)]
