"""turbo-eval recommend: the cheapest pair for a model within a quality bound."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from turbo_eval.analysis.ladder import Ladder, Windows, Wish
from turbo_eval.analysis.recommend import Bound, Candidate, best, oddities
from turbo_eval.analysis.recommend import recommend as rank
from turbo_eval.analysis.staleness import moved_on
from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.formats.window import resolve
from turbo_eval.inputs.corpora import default_name, registry, resolve_corpus
from turbo_eval.inputs.models import ModelFile, resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import collect
from turbo_eval.llama.tool import check_window
from turbo_eval.records.record import Record
from turbo_eval.records.store import Store, warn_once
from turbo_eval.serving.choose import cache_of, said_of_bound
from turbo_eval.serving.line import server_argv
from turbo_eval.sweep.plan import beyond_training
from turbo_eval.util import numbers as n
from turbo_eval.util.numbers import AUTO
from turbo_eval.util.paths import results_dir
from turbo_eval.util.process import relevant_environment


def register(app: typer.Typer) -> None:
    app.command(
        help="""Name the cheapest K/V pair for a model that is certainly within a bound.

        Takes records of this machine and build in all settings on record, or in those that --corpus, --chunks
        and --text-ctx leave; measures what is missing, the smallest pair first. Differences are against
        f16/f16 of the same text and build.

        Exit code 0: a pair is named; 1: none is within the bound; 3: the text can't decide it.

          turbo-eval recommend qwen2.5-coder-0.5b --max-delta-ppl 3% --ctx 32768

          turbo-eval recommend my.gguf --max-kld 0.02 --memory 2

          turbo-eval recommend my.gguf --max-delta-ppl 1% --until-decided --max-chunks 64

          turbo-eval recommend my.gguf --max-kld 0.01 --recent 64,128,256

          turbo-eval recommend my.gguf --corpus my.txt --chunks 40 --no-measure --json
        """
    )(recommend)


MaxKld = Annotated[
    float | None,
    typer.Option(
        parser=n.option("--max-kld", n.NATS), metavar="NATS", help="Largest mean KL divergence, in nats."
    ),
]
MaxDelta = Annotated[
    float | None,
    typer.Option(
        parser=n.percent("--max-delta-ppl"), metavar="PERCENT", help="Largest ΔPPL; 3% if no bound is given."
    ),
]
SizeCtx = Annotated[
    int | None,
    typer.Option(
        parser=n.option("--ctx", n.TOKENS), metavar="N", help="Context to size for (default: the model's)."
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(parser=n.option("--memory", n.GIB), metavar="GIB", help="Memory for the KV cache, in GiB."),
]
TextCtx = Annotated[
    int | None,
    typer.Option(
        parser=n.option("--text-ctx", n.CONTEXT),
        metavar="N",
        help="Context that was, or is to be, measured (default: any; 512).",
    ),
]


def recommend(
    model: Annotated[str, typer.Argument(help="Model by name or path.")],
    max_kld: MaxKld = None,
    max_delta_ppl: MaxDelta = None,
    ctx: SizeCtx = None,
    memory: Memory = None,
    corpus: o.Corpus = None,
    chunks: o.Chunks = None,
    text_ctx: TextCtx = None,
    recent: o.Recent = None,
    first: o.First = None,
    backend: o.Backend = None,
    threads: o.Threads = None,
    bin_dir: o.BinDir = None,
    results: o.Results = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Only look at what is on record.")] = False,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided",
            help="Add chunks to a pair that the text leaves open until it is decided; its error rate of 5 %"
            " holds at all looks together.",
        ),
    ] = False,
    max_chunks: o.MaxChunks = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, nothing else.")] = False,
) -> None:
    if until_decided and no_measure:
        raise UsageError("--until-decided measures, --no-measure does not", "leave one of them out")
    if max_kld is None and max_delta_ppl is None:
        max_delta_ppl = 3.0
        print("turbo-eval: no bound was given, taking --max-delta-ppl 3%", file=sys.stderr)
    bound = Bound(max_kld, max_delta_ppl, memory)
    file = resolve_model(model)
    window = ctx or file.gguf.n_ctx_train or 4096
    build = o.load_build(backend or "cpu", bin_dir)
    for warning in (moved_on(build), beyond_training(file, window)):
        if warning:
            warn_once(warning)
    provenance = collect(build)
    store = Store(results or results_dir(), provenance.machine.id)
    windows = _windows(recent, first, build)
    many = None if until_decided else chunks
    matches = _asked_for(file, build, backend or "cpu", corpus, many, text_ctx, windows)
    _tell_of_others(store, file, build)
    wish = _wish(file, model, corpus, chunks, text_ctx, threads, max_kld is not None, store, matches)
    wish = replace(wish, windows=windows)
    ladder = Ladder(wish, build, provenance, store, matches)
    rows = ladder.rows() if no_measure else ladder.climb(window, bound, max_chunks if until_decided else None)
    ranked = rank(rows, file.gguf, window, bound)
    code = _exit_code(ranked)
    if as_json:
        print(json.dumps(_as_json(ranked, file, build, window, bound), indent=1, ensure_ascii=False))
    else:
        _print(ranked, file, build, window, model, bound)
    if code:
        raise typer.Exit(code)


def _windows(recent: str | None, first: str | None, build: Build) -> Windows | None:
    """The exact windows that are asked for; None: nothing is."""
    if recent is None and first is None:
        return None
    sizes = tuple(n.tokens_or_auto("--recent", recent or AUTO))
    begin = o.one_window("--first", first or AUTO)
    check_window(sizes, begin, build)
    return Windows(sizes, begin)


def _asked_for(
    file: ModelFile,
    build: Build,
    backend: str,
    corpus: str | None,
    chunks: int | None,
    ctx: int | None,
    windows: Windows | None,
) -> Callable[[Record], bool]:
    """Which records count: of this model, build and environment, and of the text and the exact windows that
    were asked for."""

    text = resolve_corpus(corpus).sha256 if corpus is not None else None
    env = relevant_environment()

    def matches(record: Record) -> bool:
        cell = record.cell.batched("ppl")
        return (
            cell.model_sha256 == file.sha256
            and cell.tree == build.tree
            and cell.backend == backend
            and cell.env == env
            and text in (None, cell.corpus_sha256)
            and chunks in (None, cell.chunks)
            and ctx in (None, cell.ctx)
            and (windows is None or cell.window in windows.of((cell.k, cell.v)))
        )

    return matches


def _tell_of_others(store: Store, file: ModelFile, build: Build) -> None:
    """Records of other builds are not silently left out."""

    old = [r for r in store.all() if r.cell.model_sha256 == file.sha256 and r.cell.tree != build.tree]
    if old:
        warn_once(
            f"stale: {len(old)} records of {file.name} are of other builds than {build.tree[:12]}"
            " and do not count"
        )


def _wish(
    file: ModelFile,
    name: str,
    corpus: str | None,
    chunks: int | None,
    ctx: int | None,
    threads: int | None,
    kld: bool,
    store: Store,
    matches: Callable[[Record], bool],
) -> Any:
    """What is missing is measured as it was asked for, else as most of what is there was."""

    known = [r.cell for r in store.all() if matches(r) and r.cell.metric in ("ppl", "kld")]
    texts = registry()
    usable = [c for c in known if corpus is not None or c.corpus in texts]
    most = Counter((c.corpus, c.chunks, c.ctx) for c in usable).most_common(1)
    text, many, long = most[0][0] if most else (default_name(), 8, 512)
    return Wish(file, name, corpus or text, chunks or many, ctx or long, threads, kld)


def _exit_code(ranked: Sequence[Candidate]) -> int:
    if any(candidate.within for candidate in ranked):
        return 0
    return 3 if any(candidate.within is None for candidate in ranked) else 1


def run_line(candidate: Candidate, file: ModelFile, build: Build, ctx: int) -> str:
    """The command that serves the model with this cache."""

    return shlex.join(server_argv(build, file.path, cache_of(candidate.row), ctx=ctx))


def serve_line(candidate: Candidate, name: str, bound: Bound, ctx: int) -> str:
    """The same through `turbo-eval serve`."""
    row = candidate.row
    own = row.window == resolve(AUTO, AUTO, row.k, row.v) and row.anchor in (AUTO, "")
    what = ["--pair", f"{row.k}:{row.v}"] if own else said_of_bound(bound)
    if row.profile is not None:
        what = ["--profile", str(cache_of(row).profile)]
    return shlex.join(["turbo-eval", "serve", name, *what, "--ctx", str(ctx)])


def tune_line(name: str, bound: Bound) -> list[str]:
    """The command that finds types by layer for the bound; of two bounds, for the KL divergence."""
    return ["turbo-eval", "tune", name, *said_of_bound(bound)[:2]]


def _print(
    ranked: Sequence[Candidate], file: ModelFile, build: Build, ctx: int, name: str, bound: Bound
) -> None:
    print(f"{file.name}, build {build.tree[:12]}, KV cache at {ctx} tokens:")
    good = best(ranked)
    labels = {id(c): name for name, c in zip(("recommended", "runner-up"), good, strict=False)}
    for candidate in ranked:
        row = candidate.row
        if candidate.within and id(candidate) not in labels:
            continue
        label = labels.get(id(candidate), "undecided" if candidate.within is None else "not")
        why = [*candidate.reasons, *([candidate.doubt] if candidate.doubt else [])]
        figures = [candidate.figures()] if candidate.figures() and not candidate.reasons else []
        print(
            f"{label:12} {candidate.name}: {candidate.memory_mib:.0f} MiB ({row.bpv_k:g}/{row.bpv_v:g} bits"
            f" per value), {'; '.join([*figures, *why])} [{candidate.source()}]"
        )
    for sentence in oddities(ranked):
        print(f"{'note':12} {sentence}")
    if good:
        print(f"{'run':12} {run_line(good[0], file, build, ctx)}")
        print(f"{'or':12} {serve_line(good[0], name, bound, ctx)}")
        if good[0].row.profile is None:
            print(f"{'by layer':12} {shlex.join(tune_line(name, bound))}")
    elif _exit_code(ranked) == 3:
        print("turbo-eval: no pair is certainly within the bound: measure more chunks", file=sys.stderr)
    else:
        line = shlex.join(tune_line(name, bound))
        print(
            f"turbo-eval: no pair on record is within the bound; `{line}` measures types by layer",
            file=sys.stderr,
        )


def _as_json(
    ranked: Sequence[Candidate], file: ModelFile, build: Build, ctx: int, bound: Bound
) -> dict[str, Any]:

    def entry(candidate: Candidate) -> dict[str, Any]:
        row = candidate.row
        kld = row.get("kld")
        return {
            "k": row.k,
            "v": row.v,
            "anchor": row.anchor,
            "recent": row.window.recent,
            "first": row.window.first,
            "within": candidate.within,
            "reasons": list(candidate.reasons),
            "doubt": candidate.doubt,
            "memory_mib": candidate.memory_mib,
            "bpv": row.bpv,
            "status": row.status,
            "delta_pct": row.delta_pct,
            "delta_err_pct": row.delta.err_pct if row.delta else None,
            "kld": kld.kld.mean if kld and kld.kld else None,
            "kld_err": kld.kld.mean_err if kld and kld.kld else None,
            "against": row.against,
            "reference_key": row.reference.key if row.reference else None,
            "corpus": row.corpus,
            "ctx": row.ctx,
            "chunks": row.chunks,
            "keys": [record.key for record in row.records],
        }

    good = best(ranked)
    return {
        "model": file.name,
        "model_sha256": file.sha256,
        "tree": build.tree,
        "ctx": ctx,
        "bound": asdict(bound),
        "recommended": entry(good[0]) if good else None,
        "run": run_line(good[0], file, build, ctx) if good else None,
        "candidates": [entry(candidate) for candidate in ranked],
        "notes": oddities(ranked),
    }
