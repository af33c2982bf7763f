"""Speed records: one file a pair and depth, number of sequences or length of draft, in `bench/` beside a
machine's other records."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from turbo_eval.formats.cache_types import learn
from turbo_eval.records.cell import CellProfile
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Effective, Status
from turbo_eval.records.store import warn_once
from turbo_eval.util.files import writing

BENCH_SCHEMA = 1

# What is measured: speed over depth, several sequences at once, or the check of drafts of several tokens.
Workload = Literal["depth", "parallel", "draft"]
WORKLOADS: tuple[Workload, ...] = get_args(Workload)
# schema n → function that turns its JSON into schema n + 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


class BenchRecord(BaseModel):
    """Speed of one pair under one load. Speeds in tokens/s, one sample a round, in the order measured.

    `prefill` and `decode` are this pair's; `*_f16` those of f16/f16 in the same rounds. What they are of:

    - "depth": `prompt` tokens in one go, and `gen` tokens one by one, behind `depth` tokens in the cache;
    - "parallel": `size` sequences at once, each with a prompt of `prompt` tokens and `gen` new ones; speeds
      of all sequences together;
    - "draft": `size` new tokens in one step behind `depth` tokens, as the check of a draft takes; `decode`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = BENCH_SCHEMA
    key: str
    model: str
    model_sha256: str
    workload: Workload = "depth"
    size: int = 1
    k: str
    v: str
    depth: int
    prompt: int
    gen: int
    backend: str
    threads: int
    anchor: str
    recent: int = 0
    first: int = 0
    profile: CellProfile | None = None
    tree: str
    env: dict[str, str]
    status: Status
    detail: str = ""
    prefill: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()
    prefill_f16: tuple[float, ...] = ()
    decode_f16: tuple[float, ...] = ()
    effective: Effective = Effective()
    argv: tuple[str, ...]
    started: str
    provenance: Provenance

    @property
    def prefill_ratio(self) -> float | None:
        """Median over the rounds of this speed over f16's in the same round."""
        return _ratio(self.prefill, self.prefill_f16)

    @property
    def decode_ratio(self) -> float | None:
        """As `prefill_ratio`, for decode."""
        return _ratio(self.decode, self.decode_f16)

    @property
    def load(self) -> str:
        """ "d4096", "p8", "d4096.n32": depth, sequences at once, tokens of a draft."""
        if self.workload == "parallel":
            return f"p{self.size}"
        return f"d{self.depth}" + (f".n{self.size}" if self.workload == "draft" else "")

    @property
    def decode_each(self) -> float | None:
        """Median tokens/s of new tokens for each of the sequences."""
        median = _median(self.decode)
        return median / self.size if median is not None and self.workload == "parallel" else median

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds of a step that makes or checks `size` tokens."""
        median = _median(self.decode)
        return 1000 * self.size / median if median else None

    def row(self) -> dict[str, Any]:
        """Flat fields for scripts."""
        return self.model_dump(mode="json", exclude={"provenance", "effective", "schema_version"}) | {
            "prefill_median": _median(self.prefill),
            "decode_median": _median(self.decode),
            "prefill_ratio": self.prefill_ratio,
            "decode_ratio": self.decode_ratio,
            "decode_each": self.decode_each,
            "step_ms": self.step_ms,
            "effective_k": self.effective.k,
            "effective_v": self.effective.v,
            "effective_recent": self.effective.recent,
            "effective_first": self.effective.first,
            "machine": self.provenance.machine.id,
        }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(ours: Sequence[float], f16: Sequence[float]) -> float | None:
    pairs = [a / b for a, b in zip(ours, f16, strict=False) if b]
    return statistics.median(pairs) if pairs else None


def key_of(identity: Mapping[str, Any]) -> str:
    """16 hex digits over all that can change the speed."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]


def write_speed(folder: Path, record: BenchRecord) -> Path:
    """Write atomically.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    name = f"{Path(record.model).name}.{record.k}-{record.v}.{record.load}.{record.key}.json"
    path, scratch = folder / name, folder / f".{name}.tmp"
    data = record.model_dump(mode="json")
    if not record.provenance.types:
        del data["provenance"]["types"]
    if record.profile is None:
        del data["profile"]
    if record.workload == "depth":
        del data["workload"], data["size"]
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        scratch.replace(path)
    return path


def parse_speed(text: str) -> BenchRecord:
    """A record file's content, migrated where it is of an older schema.

    Raises:
        ValueError: not a speed record, or of a schema this version does not know.
    """
    data = json.loads(text)
    while isinstance(data, dict) and data.get("schema_version") in MIGRATIONS:
        data = MIGRATIONS[data["schema_version"]](data)
    if not isinstance(data, dict) or data.get("schema_version") != BENCH_SCHEMA:
        raise ValueError(f"it is of no schema that this turbo-eval reads ({BENCH_SCHEMA})")
    record = BenchRecord.model_validate(data)
    for name, size in record.provenance.types.items():
        learn(name, size.block, size.block_bytes)
    return record


def find_speed(folder: Path, key: str) -> BenchRecord | None:
    """The record of a key in a machine's folder of them, if there is one that can be read."""
    for path in folder.glob(f"*.{key}.json"):
        try:
            return parse_speed(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def read_bench(root: Path) -> list[BenchRecord]:
    """Every speed record under a results folder; one that cannot be read is left out with a warning."""
    records = []
    for path in sorted(root.glob("*/bench/*.json")):
        try:
            records.append(parse_speed(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            warn_once(f"benchmark record {path} cannot be read: {reason}; it is left out")
    return records
