"""SweepSpec → the cells to run, in the order to run them, with what is on record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.anchor.profile import Cache, fitting_profiles, read_profiles, windowed_profiles
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import cache_type, undivided
from turbo_eval.formats.window import OFF, resolve
from turbo_eval.inputs.corpora import CorpusFile, default_name, resolve_corpus
from turbo_eval.inputs.models import ModelFile, resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities, check_types, check_window
from turbo_eval.metrics import METRICS, wanted_metrics
from turbo_eval.metrics import metric as metric_of
from turbo_eval.metrics.base import Extent, Job, Metric
from turbo_eval.records.cell import Cell, Engine
from turbo_eval.records.record import Record
from turbo_eval.records.reference import EXACT
from turbo_eval.sweep.spec import SweepSpec
from turbo_eval.util.process import relevant_environment


@dataclass(frozen=True)
class Plan:
    """The jobs of a sweep, the reference first in each comparison. `notes`: what to know before it runs."""

    spec: SweepSpec
    build: Build
    jobs: tuple[Job, ...]
    threads: int
    notes: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        return [job.cell for job in self.jobs]


def make_plan(spec: SweepSpec, build: Build, *, download: bool = True) -> Plan:
    """Resolve models and corpus, check every pair against model and build, lay out the cells.

    Raises:
        UsageError: a type the build doesn't know, a block that doesn't divide head_dim, a corpus
            that cannot hold the context, an anchor that isn't there, a missing or broken model.
    """
    pairs = [*spec.pairs, *([spec.against] if spec.against else [])]
    check_types(build, tuple(pairs))
    name = default_name() if spec.corpus == "default" else spec.corpus
    corpus = resolve_corpus(name, download=download)
    for ctx in spec.ctx:
        _check_length(corpus, ctx, spec.chunks)
    anchors = check_anchors(spec.anchor, build)
    env = relevant_environment()
    kv_anchor = capabilities(build).kv_anchor
    check_window(spec.recent, spec.first, build)
    _check_engine(spec, build)
    profiles = read_profiles(spec.profiles, build)
    fitting = dict.fromkeys(spec.profiles, False)
    jobs: list[Job] = []
    notes: list[str] = []
    for name in spec.models:
        model = resolve_model(name, download=download)
        for pair in pairs:
            check_blocks(model, pair)
        own = fitting_profiles(profiles, model)
        fitting |= {str(p.path): True for p in own}
        notes += [note for ctx in spec.ctx if (note := beyond_training(model, ctx))]
        for ctx in spec.ctx:
            if adds_reference(spec, anchors):
                cell = _cell(spec, METRICS["ppl"], model, corpus, Cache(*EXACT), ctx, "off", build, env)
                flag = "off" if kv_anchor else None
                writes_base = "kld" in spec.metrics and cell.engine == "llama-perplexity"
                jobs.append(Job(cell, model, corpus, flag, writes_base=writes_base))
            for metric in wanted_metrics(spec.metrics):
                for anchor in anchors:
                    for cache in [
                        *windowed_pairs(spec, metric, build),
                        *windowed_profiles(spec.recent, spec.first, own),
                    ]:
                        cell = _cell(spec, metric, model, corpus, cache, ctx, anchor, build, env)
                        file = cache.profile.path if cache.profile is not None else None
                        jobs.append(Job(cell, model, corpus, anchor if kv_anchor else None, profile=file))
                        exact = metric.exact(cell)
                        if exact is not None and exact != cell:
                            at = len(jobs) - 1  # before what is compared with it
                            jobs.insert(at, Job(exact, model, corpus, exact.anchor if kv_anchor else None))
    for path in (path for path, fits in fitting.items() if not fits):
        raise UsageError(
            f"profile {path} is for another model than {', '.join(spec.models)}",
            "name its model, or make a profile with `turbo-eval tune`",
        )
    unique = {job.cell.key(): job for job in reversed(jobs)}
    kept = [job for job in jobs if unique.get(job.cell.key()) is job]
    return Plan(spec, build, tuple(kept), spec.threads or os.cpu_count() or 1, tuple(notes))


def _check_length(corpus: CorpusFile, ctx: int, chunks: int) -> None:
    """Refuse what the text certainly cannot give. A token is at least one byte (a BOS may come on top), so
    this is certain without a tokenizer."""
    if corpus.size + 1 < 2 * ctx:
        raise UsageError(
            f"corpus {corpus.name} has {corpus.size} bytes, too few for two contexts of {ctx} tokens",
            "take a longer text or a smaller --ctx",
        )
    most = (corpus.size + 1) // ctx
    if chunks > most:
        raise UsageError(
            f"corpus {corpus.name} has {corpus.size} bytes, too few for {chunks} chunks of {ctx} tokens",
            f"take a longer text or at most {most} --chunks",
        )


def beyond_training(model: ModelFile, ctx: int) -> str:
    """A warning where a context is longer than any that the model was trained on; "" where it is not."""
    trained = model.gguf.n_ctx_train
    if not trained or ctx <= trained:
        return ""
    return f"{model.name} was trained on contexts of up to {trained} tokens; {ctx} are beyond that"


def adds_reference(spec: SweepSpec, anchors: Iterable[str]) -> bool:
    """Has f16/f16 with the anchor off to be added for the sweep's comparisons? Not where it is asked for
    anyway, where another pair is named, or where nothing is compared."""
    if not spec.reference or spec.against not in (None, EXACT):
        return False
    asked = EXACT in spec.pairs and not {"off", "auto"}.isdisjoint(anchors)
    return not asked and any(m.batched or m.needs for m in map(metric_of, spec.metrics))


def ordered_pairs(spec: SweepSpec, metric: Metric = METRICS["ppl"]) -> list[tuple[str, str]]:
    """What others are compared with first, the rest as given: for perplexity the pair that was named for it,
    else f16:f16 where it is among the pairs; for generation f16:f16, which is added where the sweep does not
    have it."""
    if metric.own_exact:
        first = [EXACT]
    elif metric.batched and spec.against:
        first = [spec.against]
    else:
        first = [pair for pair in spec.pairs if pair in (spec.against or EXACT, EXACT)][:1]
    return list(dict.fromkeys([*first, *spec.pairs]))


def windowed_pairs(spec: SweepSpec, metric: Metric, build: Build) -> list[Cache]:
    """The pairs in their order, each with the exact windows that are asked for; without one where the build
    has none."""
    able = capabilities(build).kv_window
    return [
        Cache(k, v, window)
        for k, v in ordered_pairs(spec, metric)
        for window in dict.fromkeys(
            resolve(recent, spec.first, k, v) if able else OFF for recent in spec.recent
        )
    ]


def check_blocks(model: ModelFile, pair: tuple[str, str]) -> None:
    """Refuse a pair whose blocks don't divide the model's head dimensions, as the cache stores them.

    Raises:
        UsageError: names the type, its block, the model and its head_dim.
    """
    dims = model.gguf.head_dim_k or 0, model.gguf.head_dim_v or 0
    for side in undivided(*dims, *pair):
        name, dim = pair["KV".index(side)], dims["KV".index(side)]
        raise UsageError(
            f"{name} works on blocks of {cache_type(name).block} values, which do not divide head_dim {dim}"
            f" of {side} in {model.name}",
            "leave the pair out or take another type for it",
        )


_ANCHOR_MODES = ("auto", "on", "off")


def check_anchors(asked: tuple[str, ...] | None, build: Build) -> tuple[str, ...]:
    """The anchors that were asked for; None: what the build does by itself.

    Raises:
        UsageError: the build has no anchor, or one is neither a mode nor a file.
    """
    able = capabilities(build).kv_anchor
    if asked is None:
        return ("auto",) if able else ("off",)
    for anchor in asked:
        if anchor != "off" and not able:
            raise UsageError(
                f"the build in {build.bin_dir} has no --kv-anchor, so anchor {anchor!r} cannot be run",
                'use anchor "off" or the patched build',
            )
        if anchor not in _ANCHOR_MODES and not Path(anchor).is_file():
            raise UsageError(
                f"anchor {anchor!r} is not auto, on or off, and no file of that name is there",
                "make the file first",
            )
    return asked


def _cell(
    spec: SweepSpec,
    metric: Metric,
    model: ModelFile,
    corpus: CorpusFile,
    cache: Cache,
    ctx: int,
    anchor: str,
    build: Build,
    env: dict[str, str],
) -> Cell:
    in_file = anchor not in _ANCHOR_MODES
    extent = Extent(spec.chunks, min(spec.ubatch, ctx), spec.options(metric))
    return Cell(
        metric=metric.name,
        model=model.name,
        model_sha256=model.sha256,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        k=cache.k,
        v=cache.v,
        ctx=ctx,
        batch=ctx,  # one sequence at a time: KV size and memory are those of this context
        anchor=anchor,
        anchor_sha256=hashlib.sha256(Path(anchor).read_bytes()).hexdigest() if in_file else "",
        recent=cache.window.recent,
        first=cache.window.first,
        profile=cache.of_cell(),
        backend=spec.backend,
        tree=build.tree,
        env=env,
        engine=_engine(spec, metric, anchor, build) if cache.profile is None else "llama-perplexity",
        **metric.lay_out(extent),
    )


def _engine(spec: SweepSpec, metric: Metric, anchor: str, build: Build) -> Engine:
    """Who measures a cell: llama-perplexity what llama-kv-eval cannot."""
    able = capabilities(build).kv_eval and metric.per_token and "," not in anchor  # a comma ends it there
    if not spec.reference and "kld" not in spec.metrics:  # then f16/f16 would be measured for nothing
        return "llama-perplexity"
    return "kv-eval" if spec.engine == "kv-eval" and able else "llama-perplexity"


def _check_engine(spec: SweepSpec, build: Build) -> None:
    """Refuse an engine that was asked for by name and is not in the build."""
    if spec.engine == "kv-eval" and "engine" in spec.model_fields_set and not capabilities(build).kv_eval:
        raise UsageError(
            f"the build in {build.bin_dir} has no llama-kv-eval",
            'build it (make build-cpu), or use engine = "llama-perplexity" (--engine llama-perplexity)',
        )


def estimate_seconds(job: Job, known: Iterable[Record], threads: int) -> float:
    """Rough duration of a cell: from records of the same model and metric on this machine if there
    are any, else from the model's size."""
    cell = job.cell
    work = cell.ctx * cell.chunks
    rates = [
        r.run.seconds / (r.cell.ctx * r.cell.chunks)
        for r in known
        if r.ok and r.cell.metric == cell.metric and r.cell.model_sha256 == cell.model_sha256
    ]
    if rates:
        return 1.0 + work * sorted(rates)[len(rates) // 2]
    return metric_of(cell.metric).seconds(job, threads)
