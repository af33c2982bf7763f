"""What happened to a cell: its record, the figures in it, and files of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from turbo_eval.errors import IncompleteError
from turbo_eval.formats.cache_types import cache_type, learn
from turbo_eval.records.cell import Cell, Frozen
from turbo_eval.records.provenance import Provenance

SCHEMA = 1

Status = Literal[
    "ok",
    "nan",
    "crash",
    "refused",
    "timeout",
    "no-result",
    "short-corpus",
    "type-mismatch",
    "state-mismatch",
    "cpu-fallback",
    "decode-mismatch",
    "base-invalid",
]
STATUSES: tuple[Status, ...] = get_args(Status)


class Effective(Frozen):
    """What llama.cpp said at start-up that it runs; None: it did not say.

    `k`, `v` are ggml type names, joined by "+" if several caches differ. Sizes in MiB for the
    whole cache of `ctx` tokens. `graph_splits` is the scheduler's: a GPU run whose attention
    stays on the GPU has a handful, one that falls back has at least one a layer. `anchor` is "off" or
    "on (…)" as printed; `gpu` its lines on the GPU's
    compute capability or family; `k_bits` the mean bits per K value where the anchor mixes types over layers.
    `types_k`, `types_v` are the types by layer of a KV profile; `v_bits` the mean bits per V value, of a
    profile or where heads are filled up with zeros.
    `recent`, `first` are the exact window's sizes in tokens (0: off), `window_type` its type, `window_mib`
    its size, which `kv_mib` includes, `window_bits` the bits per value of the whole cache, window counted.
    """

    k: str | None = None
    v: str | None = None
    kv_mib: float | None = None
    k_mib: float | None = None
    v_mib: float | None = None
    kv_layers: int | None = None
    kv_devices: tuple[str, ...] = ()
    rot_k: bool | None = None
    rot_v: bool | None = None
    flash_attn: bool | None = None
    anchor: str | None = None
    k_bits: float | None = None
    v_bits: float | None = None
    types_k: str | None = None
    types_v: str | None = None
    recent: int | None = None
    first: int | None = None
    window_type: str | None = None
    window_mib: float | None = None
    window_bits: float | None = None
    ctx: int | None = None
    ubatch: int | None = None
    devices: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    layers_offloaded: int | None = None
    layers: int | None = None
    graph_splits: int | None = None
    config_files: tuple[str, ...] = ()


class Kld(Frozen):
    """KL divergence from the f16/f16 run, in nats, and its companions; `_err` standard errors.

    An error is None where llama-perplexity prints nan: two runs so alike that its variance of their
    difference rounds below zero.

    `ratio` is PPL/PPL(base) with its paired uncertainty, `same_top_pct` how often both rank the
    same token first, `rms_dp_pct` the RMS change of the true token's probability, in percent.
    """

    mean: float
    mean_err: float | None
    median: float
    p90: float
    p99: float
    p999: float
    max: float
    ppl_base: float
    ppl_base_err: float | None
    ln_ratio: float
    ln_ratio_err: float | None
    ratio: float
    ratio_err: float | None
    rms_dp_pct: float
    rms_dp_pct_err: float | None
    same_top_pct: float
    same_top_pct_err: float | None


class ByChunk(Frozen):
    """Means over the scored tokens of each chunk, in the order of the text: what paired tests are made of.

    `nll` and `base_nll` are negative log-likelihoods, in nats, of this cache and of f16/f16 in the same
    process, `kld` the KL divergence from it, `same_top` the share of tokens on which both find the same token
    most probable. `lost` and `won` count tokens, over all chunks, that only f16/f16 or only this cache
    predicts; `scored` all of them. `sequential`: the number of chunks was decided by looking at the figures
    (`sweep --until-decided`), so only an interval that allows for that may be read from them.
    """

    nll: tuple[float, ...]
    base_nll: tuple[float, ...]
    kld: tuple[float, ...]
    same_top: tuple[float, ...]
    lost: int
    won: int
    scored: int
    sequential: bool = False


class TokenFile(Frozen):
    """The figures of each token, in a file beside the record; `file` is relative to the record's folder."""

    file: str
    sha256: str


class Decode(Frozen):
    """Perplexity through ubatch 1 against the batched one over the same chunks."""

    ppl_batched: float
    delta_pct: float
    bound_pct: float
    batched_key: str


class Greedy(Frozen):
    """Greedy generation against f16/f16 of the same build.

    `first_divergence` is the median index of the first differing token over the prompts that
    differ (None: none does), `outputs` the token ids, `identical_pct` the share of prompts without
    a difference, `agree_pct` the share of tokens before the first difference.
    """

    prompts: int
    tokens: int
    identical_pct: float
    agree_pct: float
    first_divergence: float | None
    outputs: tuple[tuple[int, ...], ...]


class Needle(Frozen):
    """Retrieval of a planted number: hits out of the probes that f16/f16 gets right."""

    probes: int
    f16_hits: int
    hits: int
    detail: tuple[tuple[int, float, bool, bool], ...]  # length, depth, f16 hit, hit


class Run(Frozen):
    """How the process went. Times in seconds, `started` in UTC (ISO 8601), memory in MiB.

    Where one process measured several cells, `cells` says how many, and `seconds` and `cpu_seconds` are an
    equal share of its own.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    env_removed: tuple[str, ...]
    started: str
    seconds: float
    cpu_seconds: float
    peak_mib: float
    returncode: int | None
    threads: int
    log: str
    cells: int = 1


class Record(Frozen):
    """One cell's outcome. Without status "ok" there are no numbers.

    `figures` are those of metrics that have no field of their own, by name.
    """

    schema_version: int = SCHEMA
    key: str
    cell: Cell
    status: Status
    detail: str = ""
    ppl: float | None = None
    ppl_err: float | None = None
    running_ppl: tuple[float, ...] = ()
    by_chunk: ByChunk | None = None
    tokens: TokenFile | None = None
    kld: Kld | None = None
    decode: Decode | None = None
    greedy: Greedy | None = None
    needle: Needle | None = None
    figures: dict[str, float | str] = Field(default_factory=dict)
    effective: Effective = Effective()
    run: Run
    provenance: Provenance

    @model_validator(mode="after")
    def _sound(self) -> Record:
        if self.ppl is not None and self.ppl <= 0:
            raise ValueError(f"a perplexity of {self.ppl} cannot be")
        return self

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def machine(self) -> str:
        return self.provenance.machine.id

    @property
    def bpv_k(self) -> float:
        """Bits per K value: as run where llama.cpp says so, else the type's."""
        if self.cell.profile is not None:
            return self.cell.profile.bits_k
        return self.effective.k_bits or cache_type(self.cell.k).bpv

    @property
    def bpv_v(self) -> float:
        """Bits per V value."""
        if self.cell.profile is not None:
            return self.cell.profile.bits_v
        return self.effective.v_bits or cache_type(self.cell.v).bpv

    def row(self) -> dict[str, Any]:
        """One flat mapping of the fields that tables and scripts use."""
        cell = self.cell
        flat: dict[str, Any] = {
            "key": self.key,
            "metric": cell.metric,
            "model": cell.model,
            "corpus": cell.corpus,
            "k": cell.k,
            "v": cell.v,
            "ctx": cell.ctx,
            "chunks": cell.chunks,
            "ubatch": cell.ubatch,
            "engine": cell.engine,
            "anchor": cell.anchor,
            "recent": cell.recent,
            "first": cell.first,
            "profile_sha256": cell.profile.sha256 if cell.profile is not None else None,
            "backend": cell.backend,
            "status": self.status,
            "detail": self.detail,
            "ppl": self.ppl,
            "ppl_err": self.ppl_err,
            "bpv_k": self.bpv_k,
            "bpv_v": self.bpv_v,
            "kv_mib": self.effective.kv_mib,
            "effective_k": self.effective.k,
            "effective_v": self.effective.v,
            "effective_anchor": self.effective.anchor,
            "effective_recent": self.effective.recent,
            "effective_first": self.effective.first,
            "model_sha256": cell.model_sha256,
            "corpus_sha256": cell.corpus_sha256,
            "tree": cell.tree,
            "machine": self.machine,
            "started": self.run.started,
            "seconds": self.run.seconds,
        }
        for name in ("kld", "decode", "greedy", "needle"):
            part = getattr(self, name)
            flat[name] = part.model_dump(mode="json") if part is not None else None
        return flat | self.figures

    def to_json(self) -> str:
        """The file's content. NaN cannot occur: failed cells hold no numbers."""
        data = self.model_dump(mode="json")
        for name in ("figures", "by_chunk", "tokens"):
            if not data[name]:
                del data[name]
        if self.cell.profile is None:
            del data["cell"]["profile"]
            for name in ("v_bits", "types_k", "types_v"):
                if data["effective"][name] is None:
                    del data["effective"][name]
        if not self.provenance.types:
            del data["provenance"]["types"]
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: float | None) -> bool:
    """True for a real number."""
    return value is not None and math.isfinite(value)


# schema n → function that turns its JSON into schema n + 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def read_record(path: Path) -> Record:
    """Read and, where needed, migrate a record.

    Raises:
        IncompleteError: unreadable, not a record, or of a schema this version doesn't know.
    """
    step = "delete it and rerun the sweep"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IncompleteError(f"record {path} cannot be read: {error}", step) from None
    if not isinstance(data, dict) or not isinstance(data.get("schema_version"), int):
        raise IncompleteError(f"{path} is no turbo-eval record: it has no schema_version", step)
    while data["schema_version"] in MIGRATIONS:
        data = MIGRATIONS[data["schema_version"]](data)
    if data["schema_version"] != SCHEMA:
        raise IncompleteError(
            f"record {path} has schema {data['schema_version']}, this turbo-eval reads {SCHEMA}",
            "update turbo-eval or rerun the sweep",
        )
    try:
        record = Record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise IncompleteError(f"record {path} is damaged at {where}: {first['msg']}", step) from None
    if record.key != record.cell.key():
        raise IncompleteError(f"record {path} does not hold the cell its key names", step)
    if record.provenance.tree != record.cell.tree:
        raise IncompleteError(f"record {path} was measured with another build than its cell's", step)
    for name, size in record.provenance.types.items():
        learn(name, size.block, size.block_bytes)
    return record


def json_schema() -> str:
    """The schema of a record file (JSON Schema 2020-12), as text."""
    schema = Record.model_json_schema(mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"turbo-eval record, schema version {SCHEMA}"
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
