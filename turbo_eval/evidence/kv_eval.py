"""The per-token figures that llama-kv-eval writes → arrays. Pure reading, no judgement.

Format, version 1, little-endian (tools/kv-eval/README.md in the patched tree): `kv-eval\\n`, u32 version,
then records of u32 kind, u32 size, content. Kind 1: header, JSON. Kind 2: u32 path, u32 chunk, u32 run, u32 n
and columns of n values of 4 bytes. Kind 3: end, JSON; without it the run was stopped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from turbo_eval.errors import IncompleteError

MAGIC = b"kv-eval\n"
VERSION = 1

# How the tokens went through the model: many at once, or one at a time as in decoding.
EvalPath = Literal["batched", "one-token"]
PATHS: tuple[EvalPath, ...] = get_args(EvalPath)
RunStatus = Literal["ok", "refused", "failed", "nan"]

_HEADER, _DATA, _END = 1, 2, 3
_COLUMNS = {
    "reference": {"token": "u4", "nll": "f4", "top": "u4", "rank": "u4"},
    "pair": {"nll": "f4", "kld": "f4", "top": "u4", "rank": "u4", "dp": "f4"},
}


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class EvalRun(_Read):
    """One KV cache as it ran; number 0 is the reference.

    `layers_k`, `layers_v` count layers by type, `layers_anchored` those with a K anchor; `rot_k`, `rot_v`
    are the sizes of the rotation (0: none); `n_flash_attn` the attention operations that are flash attention;
    `buffers` where the cache lies. They are read from the graph that was computed: empty for a refused pair.
    `recent`, `first` and `recent_type` are the exact window in force (0, 0, "": none).
    """

    spec: str
    type_k: str
    type_v: str
    anchor: str
    layers_k: dict[str, int]
    layers_v: dict[str, int]
    layers_anchored: int
    rot_k: int
    rot_v: int
    n_flash_attn: int
    buffers: tuple[str, ...]
    context_bytes: int
    compute_bytes: int
    recent: int = 0
    first: int = 0
    recent_type: str = ""
    status: RunStatus = "ok"
    detail: str = ""


class EvalHeader(_Read):
    """What makes the numbers. Sizes in tokens; `n_seq` chunks were evaluated together.

    The first half of `n_prompt` chunks is the prompt of each of `trajectories` ("greedy" or
    "TEMPERATURE:SEED"), which f16/f16 generated.
    """

    build: str
    model: str
    n_params: int
    n_vocab: int
    n_tokens: int
    add_bos: bool
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq: int
    n_threads: int
    first_chunk: int
    n_chunk: int
    n_one_token: int
    n_prompt: int = 0
    trajectories: tuple[str, ...] = ()
    first_scored: int
    n_scored: int
    system: str
    columns: dict[str, dict[str, str]]
    runs: tuple[EvalRun, ...]


@dataclass(frozen=True)
class Figures:
    """Per-token figures of one run, arrays of shape (chunks, scored tokens).

    Attributes:
        chunks: number of each chunk in the text.
        token: the true token; on a trajectory the one that was generated.
        nll: its negative log-likelihood, nats.
        top: the most probable token; on a trajectory the one that this cache would have generated.
        rank: of the true token, 1: most probable.
        kld: KL divergence from the reference, nats; 0 for the reference itself.
        dp: probability of the true token minus the reference's; 0 for the reference itself.
    """

    chunks: tuple[int, ...]
    token: NDArray[np.uint32]
    nll: NDArray[np.float32]
    top: NDArray[np.uint32]
    rank: NDArray[np.uint32]
    kld: NDArray[np.float32]
    dp: NDArray[np.float32]


class _EndRun(_Read):
    status: RunStatus
    detail: str


class _End(_Read):
    runs: tuple[_EndRun, ...]


@dataclass(frozen=True)
class KvEval:
    """A file of llama-kv-eval.

    Attributes:
        header: how it was made; the runs in it carry their final status.
    """

    header: EvalHeader
    _blocks: dict[tuple[int, int], dict[int, dict[str, NDArray[np.generic]]]]

    @property
    def runs(self) -> tuple[EvalRun, ...]:
        """The reference, then the pairs in the order of the command line."""
        return self.header.runs

    def figures(self, run: int, path: str = "batched") -> Figures:
        """Per-token figures of a run.

        Args:
            path: one of PATHS, or a trajectory.

        Raises:
            IncompleteError: it did not get to the end, or nothing was evaluated on that path.
        """
        state = self.runs[run]
        if state.status != "ok":
            raise IncompleteError(f"{state.spec} has no figures: {state.status}, {state.detail}")
        place = [*PATHS, *self.header.trajectories].index(path)
        mine, base = self._blocks.get((place, run), {}), self._blocks.get((place, 0), {})
        if not mine:
            raise IncompleteError(f"{state.spec} was not evaluated {path}")
        chunks = tuple(sorted(mine))

        def stack(blocks: dict[int, dict[str, NDArray[np.generic]]], name: str) -> NDArray[np.generic]:
            return np.stack([blocks[chunk][name] for chunk in chunks])

        nll = stack(mine, "nll").astype(np.float32)
        zero = np.zeros_like(nll)
        return Figures(
            chunks=chunks,
            token=stack(base, "token").astype(np.uint32),
            nll=nll,
            top=stack(mine, "top").astype(np.uint32),
            rank=stack(mine, "rank").astype(np.uint32),
            kld=stack(mine, "kld").astype(np.float32) if run else zero,
            dp=stack(mine, "dp").astype(np.float32) if run else zero,
        )


def read_kv_eval(path: Path) -> KvEval:
    """Read a file of llama-kv-eval.

    Raises:
        IncompleteError: it cannot be read, is no such file, is of another version, stops early or contradicts
            itself.
    """
    step = "run llama-kv-eval again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IncompleteError(f"{path} cannot be read: {error.strerror}", step) from None
    if data[: len(MAGIC)] != MAGIC:
        raise IncompleteError(f"{path} is no file of llama-kv-eval", step)
    if len(data) < len(MAGIC) + 4:
        raise IncompleteError(f"{path} stops after its first bytes", step)
    (version,) = struct.unpack_from("<I", data, len(MAGIC))
    if version != VERSION:
        raise IncompleteError(
            f"{path} has version {version}, this turbo-eval reads {VERSION}",
            "use the build and turbo-eval together",
        )
    try:
        return _assemble(list(_records(data)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IncompleteError(f"{path} is damaged at {where or 'its JSON'}: {first['msg']}", step) from None
    except _DamagedError as error:
        raise IncompleteError(f"{path} {error}", step) from None


class _DamagedError(Exception):
    pass


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = len(MAGIC) + 4
    while at < len(data):
        if at + 8 > len(data):
            raise _DamagedError("is cut off: the run was stopped or the disk was full")
        kind, size = struct.unpack_from("<II", data, at)
        at += 8
        if at + size > len(data):
            raise _DamagedError("is cut off: the run was stopped or the disk was full")
        yield kind, data[at : at + size]
        at += size


def _assemble(records: list[tuple[int, bytes]]) -> KvEval:
    if not records or records[0][0] != _HEADER:
        raise _DamagedError("has no header")
    header = EvalHeader.model_validate_json(records[0][1])
    if records[-1][0] != _END:
        raise _DamagedError("has no end: the run was stopped before it was done")
    end = _End.model_validate_json(records[-1][1])
    if {name: list(columns) for name, columns in header.columns.items()} != {
        name: list(columns) for name, columns in _COLUMNS.items()
    }:
        raise _DamagedError(f"has other columns than version {VERSION}")
    if len(end.runs) != len(header.runs):
        raise _DamagedError(f"names {len(header.runs)} runs and ends {len(end.runs)}")
    blocks: dict[tuple[int, int], dict[int, dict[str, NDArray[np.generic]]]] = {}
    for kind, content in records[1:-1]:
        if kind != _DATA:
            raise _DamagedError(f"holds a record of kind {kind} among the figures")
        path, chunk, run, columns = _block(content, header)
        of_run = blocks.setdefault((path, run), {})
        if chunk in of_run:
            raise _DamagedError(f"holds chunk {chunk} of run {run} twice")
        of_run[chunk] = columns
    runs = tuple(
        run.model_copy(update={"status": last.status, "detail": last.detail})
        for run, last in zip(header.runs, end.runs, strict=True)
    )
    whole = KvEval(header.model_copy(update={"runs": runs}), blocks)
    _check_complete(whole, blocks)
    return whole


def _block(content: bytes, header: EvalHeader) -> tuple[int, int, int, dict[str, NDArray[np.generic]]]:
    if len(content) < 16:
        raise _DamagedError("holds figures without their place")
    path, chunk, run, n = struct.unpack_from("<IIII", content)
    if path >= len(PATHS) + len(header.trajectories) or run >= len(header.runs) or n != header.n_scored:
        raise _DamagedError(f"holds {n} figures of run {run}, path {path}, which its header does not know")
    names = _COLUMNS["pair" if run else "reference"]
    if len(content) != 16 + 4 * n * len(names):
        raise _DamagedError(f"holds figures of {len(content)} bytes for {n} tokens of run {run}")
    columns: dict[str, NDArray[np.generic]] = {
        name: np.frombuffer(content, dtype=f"<{kind}", count=n, offset=16 + 4 * n * place)
        for place, (name, kind) in enumerate(names.items())
    }
    return path, chunk, run, columns


def _check_complete(
    whole: KvEval, blocks: dict[tuple[int, int], dict[int, dict[str, NDArray[np.generic]]]]
) -> None:
    header = whole.header
    paths = [*PATHS, *header.trajectories]
    asked_of = (header.n_chunk, header.n_one_token, *[header.n_prompt] * len(header.trajectories))
    for place, asked in enumerate(asked_of):
        wanted = set(range(header.first_chunk, header.first_chunk + asked))
        for number, run in enumerate(whole.runs):
            have = set(blocks.get((place, number), {}))
            if run.status == "ok" and have != wanted:
                raise _DamagedError(
                    f"has {len(have & wanted)} of {asked} chunks of {run.spec}, {paths[place]}"
                )
