"""What a number was measured with: data, collected by `llama.provenance`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from turbo_eval.util.project import BlockSize


class Machine(BaseModel):
    """The computer, described without naming it: no host name, no serial number."""

    model_config = ConfigDict(frozen=True)

    id: str  # slug of CPU, cores and a short hash of both, features and GPU; a folder under results/
    cpu: str
    features: tuple[str, ...]  # the CPU flags that ggml has code for
    cores: int  # logical, those that this process may use
    memory_gib: float
    os: str
    gpu: str = ""


class Provenance(BaseModel):
    """Everything that can change a number and is not part of the cell asked for."""

    model_config = ConfigDict(frozen=True)

    backend: str
    pin: str
    series: str  # sha256 over the patch series, "" for a foreign build
    tree: str
    dirty: bool
    compiler: str
    flags: tuple[str, ...]
    machine: Machine
    packages: dict[str, str]  # distribution -> version
    harness: str  # turbo-eval version and commit
    # cache types that only the project's sources have: without them its records could be read nowhere else
    types: dict[str, BlockSize] = Field(default_factory=dict)
