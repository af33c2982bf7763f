"""Options that several commands share, and the sweep they describe together."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama.backends import BACKENDS
from turbo_eval.llama.build import Build, find_build
from turbo_eval.sweep.spec import load_sweep_data, sweep_spec
from turbo_eval.util import numbers as n

Config = Annotated[
    Path | None, typer.Argument(help="A sweep or gate config, e.g. configs/demo.toml.", show_default=False)
]
Model = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="Model by name or path; may be repeated.", show_default=False),
]
Corpus = Annotated[
    str | None, typer.Option("--corpus", "-f", help="Corpus by name or path.", show_default=False)
]
Pairs = Annotated[
    str | None,
    typer.Option("--pairs", "-p", help="K:V,K:V,… e.g. q8_0:turbo3,turbo4:turbo4.", show_default=False),
]
Profiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--profile",
        help="A KV profile (see `turbo-eval tune`), measured like a pair; may be repeated.",
        show_default=False,
    ),
]
KTypes = Annotated[
    str | None, typer.Option("--k", help="K types, with --v: every combination.", show_default=False)
]
VTypes = Annotated[str | None, typer.Option("--v", help="V types, see --k.", show_default=False)]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        "--baseline",
        metavar="K:V",
        help="Take ΔPPL against this pair (default: f16:f16, anchor off).",
        show_default=False,
    ),
]
NoReference = Annotated[
    bool, typer.Option("--no-reference", help="Measure no reference beside the pairs and show no ΔPPL.")
]
Metrics = Annotated[
    str | None,
    typer.Option(help="ppl, kld, decode, greedy, needle; comma-separated.", show_default=False),
]
Ctx = Annotated[str | None, typer.Option(help="Context in tokens; comma-separated.", show_default=False)]
Chunks = Annotated[
    int | None,
    typer.Option(
        parser=n.option("--chunks", n.COUNT),
        metavar="N",
        help="Chunks of that many tokens to score.",
        show_default=False,
    ),
]
UBatch = Annotated[
    int | None,
    typer.Option(
        parser=n.option("--ubatch", n.TOKENS),
        metavar="N",
        help="Physical batch in tokens (default 512).",
        show_default=False,
    ),
]
Anchor = Annotated[
    str | None,
    typer.Option(help="K anchor: auto, on, off or a file; comma-separated.", show_default=False),
]
Recent = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N[,N…]",
        help="Exact window: keep the last N tokens exact beside a quantized cache (auto: 128 below 8 bits).",
        show_default=False,
    ),
]
First = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N", help="Exact window: keep the first N tokens too (auto: 4).", show_default=False
    ),
]
Backend = Annotated[str | None, typer.Option(help="cpu, metal, cuda or vulkan.", show_default=False)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        parser=n.option("--threads", n.THREADS),
        metavar="N",
        help="CPU threads (default: all cores).",
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        parser=n.option("--timeout", n.SECONDS),
        metavar="SECONDS",
        help="Seconds a cell may take (default: until silent for an hour).",
        show_default=False,
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="kv-eval (default): all caches in one process; llama-perplexity: one process a cell.",
        show_default=False,
    ),
]
Margin = Annotated[
    float,
    typer.Option(
        "--margin",
        parser=n.option("--margin", n.MARGIN),
        metavar="PERCENT",
        help="Change of perplexity that verdicts are about, in percent.",
    ),
]
UntilDecided = Annotated[
    float | None,
    typer.Option(
        "--until-decided",
        parser=n.option("--until-decided", n.MARGIN),
        metavar="PERCENT",
        help="Add chunks to each pair until it is certain whether its perplexity is within this margin.",
        show_default=False,
    ),
]
MaxChunks = Annotated[
    int,
    typer.Option(
        "--max-chunks",
        parser=n.option("--max-chunks", n.COUNT),
        metavar="N",
        help="With --until-decided: no pair gets more.",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Run every cell, on record or not; what a new number replaces goes to history/."
    ),
]
Retries = Annotated[
    int,
    typer.Option(
        parser=n.option("--retries", n.COUNT_OR_NONE),
        metavar="N",
        help="How often a cell is tried again that a worker lost.",
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        parser=n.option("--patience", n.SECONDS),
        metavar="SECONDS",
        help="How long to wait for a worker that fits, or for the scheduler.",
    ),
]
BinDir = Annotated[
    Path | None,
    typer.Option(help="Use llama.cpp's tools from this folder instead of our build.", show_default=False),
]
Results = Annotated[Path | None, typer.Option(help="Results folder (default: results/).", show_default=False)]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Where cells run: local, local:N, tcp://host:port, tls://host:port or a scheduler file.",
        show_default=False,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        parser=n.option("--jobs", n.COUNT),
        metavar="N",
        help="Cells at a time on this machine, one a device: as local:N.",
        show_default=False,
    ),
]
TlsCa = Annotated[
    Path | None, typer.Option(help="Authority that signed all certificates (PEM).", show_default=False)
]
TlsCert = Annotated[Path | None, typer.Option(help="Own certificate (PEM).", show_default=False)]
TlsKey = Annotated[Path | None, typer.Option(help="Its key (PEM).", show_default=False)]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow an unencrypted scheduler on another machine.")
]


def warn(*notes: str) -> None:
    """A line on stderr for each note that isn't empty."""
    for note in filter(None, notes):
        print(f"turbo-eval: warning: {note}", file=sys.stderr)


def split(text: str | None) -> list[str] | None:
    """The items of a comma-separated option; None if it was not given."""
    return [p.strip() for p in text.split(",") if p.strip()] if text is not None else None


def overrides(**given: Any) -> dict[str, Any]:
    """Config keys from option values; those not given are left out.

    Raises:
        UsageError: a context that is no number of tokens.
    """
    lists = ("pairs", "k", "v", "metrics", "anchor")
    data = {key: value for key, value in given.items() if value not in (None, [])}
    for key in lists:
        if key in data:
            data[key] = split(data[key])
    if "recent" in data:
        data["recent"] = n.tokens_or_auto("--recent", data["recent"])
    if "first" in data:
        data["first"] = one_window("--first", data["first"])
    if "ctx" in data:
        data["ctx"] = n.several("--ctx", data["ctx"], n.CONTEXT)
    return data


def one_window(name: str, text: str) -> n.TokensOrAuto:
    """A single "auto" or number of tokens.

    Raises:
        UsageError: anything else.
    """

    sizes = n.tokens_or_auto(name, text)
    if len(sizes) > 1:
        raise UsageError(f"{name} takes one number, not {text}", f"give {n.WINDOW.words}")
    return sizes[0]


def merged(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The config file's sweep with the options laid over it."""

    data = load_sweep_data(config) if config else {"name": "command line"}
    if "models" in given:
        data.pop("model", None)
    if "metrics" in given:
        data.pop("metric", None)
    if any(key in given for key in ("pairs", "k", "v")):
        for key in ("pairs", "k", "v"):
            data.pop(key, None)
    if "against" in given or given.get("reference") is False:  # what the file names gives way
        for key in ("against", "baseline"):
            data.pop(key, None)
    return data | given


def load_spec(config: Path | None, given: dict[str, Any]) -> Any:
    """The validated sweep.

    Raises:
        UsageError: bad config, or neither a config nor pairs.
    """

    if config is None and not any(key in given for key in ("pairs", "k", "v", "profiles")):
        raise UsageError("nothing to sweep", "give a config such as configs/demo.toml, --pairs or --profile")
    return sweep_spec(merged(config, given), str(config) if config else "options")


def load_build(backend: str, bin_dir: Path | None) -> Any:
    """Our build of the backend, or the foreign one in `bin_dir`.

    Raises:
        EnvironmentProblem: not built.
        UsageError: no llama.cpp in `bin_dir`.
    """

    return Build.from_bin_dir(bin_dir) if bin_dir else find_build(backend)


def load_build_to_plan(backend: str, bin_dir: Path | None, *, remote: bool) -> Any:
    """As `load_build`; for a remote sweep any build of ours will do, because only its tree and cache
    types are looked at here: a laptop can plan for a cluster's GPUs.

    Raises:
        EnvironmentProblem, UsageError: as `load_build`.
    """

    try:
        return load_build(backend, bin_dir)
    except EnvironmentProblem:
        for other in BACKENDS if remote and backend in BACKENDS else ():
            try:
                return replace(find_build(other), backend=backend)
            except EnvironmentProblem:
                continue
        raise
