"""What the harness needs to know about a model, read from its GGUF header."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class GgufInfo(BaseModel):
    """Shape of a model. Counts are per layer; head dims are in values."""

    model_config = ConfigDict(frozen=True)

    arch: str
    name: str
    file_type: str  # e.g. "MOSTLY_Q4_K_M"
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    n_vocab: int
    tensor_count: int


def read_gguf_info(path: Path) -> GgufInfo:
    """Read the header of `path`.

    Raises:
        UsageError: missing, not GGUF, truncated, or without the keys of a language model.
    """
    raise NotImplementedError
