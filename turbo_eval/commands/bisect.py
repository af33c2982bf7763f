"""turbo-eval bisect: the first commit that makes a cell bad."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from turbo_eval.bisect import Bisection, Condition
from turbo_eval.bisect.builder import Builder
from turbo_eval.bisect.history import open_history, series_commits
from turbo_eval.commands import options as o
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import parse_pair
from turbo_eval.sweep.spec import sweep_spec


def register(app: typer.Typer) -> None:
    app.command(
        help="""Find the first revision at which a cell becomes bad: build, run the cell, tell `git bisect`.

        Revisions are commits of this repository (each builds its pin with its patches), with
        --series numbers of patches (0 is upstream), with --repo commits of a llama.cpp clone.
        What doesn't build, or doesn't know the cache type yet, is skipped. Builds and numbers are
        kept by tree: an interrupted search goes on where it was when started again.

        In --bad-if: ppl, ppl_err, kld, kld_p99, same_top of the cell; `baseline`, the same number at
        --good; f16, the perplexity of f16:f16 at the same revision. NaN, a crash and the like are bad.
        Exit code 0: found; 3: skipped revisions hide it; 2: the ends are not good and bad.

          turbo-eval bisect --good v0.1 --bad HEAD --cell q8_0:turbo4 --bad-if 'ppl > 1.05 * baseline'

          turbo-eval bisect --series --cell turbo4:turbo4 --bad-if 'ppl > 1.1 * f16' --dry-run

          turbo-eval bisect --repo ~/llama.cpp --good b9000 --bad master --cell q4_0:q4_0
          --bad-if 'kld > 2 * baseline'

        With --cell FILE a KV profile runs as it is, its exact window too.
        """
    )(bisect)


def bisect(
    cell: Annotated[str, typer.Option(help="The K:V pair to run, e.g. q8_0:turbo4, or a KV profile's file.")],
    bad_if: Annotated[str, typer.Option("--bad-if", help="Condition, e.g. 'ppl > 1.05 * baseline'.")],
    good: Annotated[str | None, typer.Option(help="A revision that is good.", show_default=False)] = None,
    bad: Annotated[str | None, typer.Option(help="A revision that is bad.", show_default=False)] = None,
    series: Annotated[bool, typer.Option("--series", help="Bisect the patch series: its first n.")] = False,
    repo: Annotated[
        Path | None, typer.Option(help="Bisect this clone of llama.cpp.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Model by name or path.")] = "smollm2-135m",
    corpus: o.Corpus = None,
    ctx: Annotated[int, typer.Option(help="Context in tokens.")] = 512,
    chunks: Annotated[int, typer.Option(help="Chunks of that many tokens to score.")] = 2,
    decode: Annotated[bool, typer.Option("--decode", help="Judge the one-token decode path.")] = False,
    backend: Annotated[str, typer.Option(help="cpu, metal, cuda or vulkan.")] = "cpu",
    anchor: Annotated[str | None, typer.Option(help="K anchor: auto, on, off or a file.")] = None,
    threads: o.Threads = None,
    timeout: o.Timeout = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Compilers at a time.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-D", help="A further CMake option KEY=VALUE.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show steps and estimate, run nothing.")] = False,
) -> None:

    condition = Condition(bad_if)
    profile = Path(cell).is_file()
    exact = ("f16", "f16")
    pairs = [] if profile else [parse_pair(cell)]
    if "f16" in condition.names and exact not in pairs:
        pairs.insert(0, exact)
    of_kld = {"kld", "kld_p99", "same_top"} & condition.names
    spec = sweep_spec(
        {
            "name": "bisect",
            "models": [model],
            **({"corpus": corpus} if corpus else {}),
            "pairs": [":".join(p) for p in pairs],
            **({"profile": cell} if profile else {}),
            "baseline": ":".join(pairs[0] if pairs else exact),
            "metrics": ["decode" if decode else "kld" if of_kld else "ppl"],
            "ctx": [ctx],
            "chunks": chunks,
            "backend": backend,
            **({"anchor": [anchor]} if anchor else {}),
            # beside a pair an exact window would hide part of a kernel's fault; it is part of a profile
            "recent": ["auto" if profile else 0],
            "threads": threads,
            "timeout": timeout,
        },
        "options",
    )
    if series and repo:
        raise UsageError("--series and --repo exclude each other", "leave one out")
    if not series and not (good and bad):
        raise UsageError("--good and --bad are missing", "name a revision of each kind")
    history = open_history(repo, series=series)
    if series:
        ends = _series_ends(series_commits(history), good, bad)
    else:
        ends = (history.commit(good or ""), history.commit(bad or ""))
    extra = {}
    for item in option or []:
        key, equals, value = item.removeprefix("-D").partition("=")
        if not equals:
            raise UsageError(f"{item} is no CMake option", "write it as KEY=VALUE")
        extra[key] = value
    builder = Builder(history, backend, jobs or os.cpu_count() or 2, extra)
    search = Bisection(history, *ends, spec, condition, builder, lambda line: print(line, flush=True))
    if dry_run:
        _print_estimate(search)
        return
    _print_outcome(search)


def _series_ends(commits: list[str], good: str | None, bad: str | None) -> tuple[str, str]:

    def end(text: str | None, default: int) -> str:
        try:
            return commits[default if text is None else int(text)]
        except (ValueError, IndexError):
            raise UsageError(
                f"{text} is no number of patches of the series", f"give one from 0 to {len(commits) - 1}"
            ) from None

    return end(good, 0), end(bad, len(commits) - 1)


def _print_estimate(search: Bisection) -> None:
    found = search.estimate()
    cell = f"{found.cell:.0f} s a cell" if found.cell is not None else "a cell's time is not known yet"
    build = (
        f"about {found.first_build / 60:.0f} min for the first build, the others build what changed"
        if found.first_build is not None
        else "a build's time is not known yet"
    )
    print(f"{found.commits} commits to search: {found.steps} steps, at most {found.builds} builds")
    print(f"estimate: {build}; {cell}")


def _print_outcome(search: Bisection) -> None:
    outcome = search.run()
    subject = search.history.subject
    skipped = sum(m.verdict == "skip" for m in outcome.tested)
    print(f"{len(outcome.tested)} revisions tested, {outcome.builds} built, {skipped} skipped")
    if outcome.first_bad is None:
        print("skipped revisions hide the answer; the first bad one is among:")
        for commit in outcome.candidates:
            print(f"  {subject(commit)}")
        raise typer.Exit(3)
    print(f"first bad: {subject(outcome.first_bad.commit)}: {outcome.first_bad.words}")
    if outcome.before is not None:
        print(f"before it: {subject(outcome.before.commit)}: {outcome.before.words}")
