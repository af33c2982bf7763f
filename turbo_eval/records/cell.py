"""What is asked (Cell), and the identity that joins it to what happened."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from turbo_eval.formats.window import Window

# Who measures: one process that scores all caches of a comparison together, or one process a cell.
Engine = Literal["kv-eval", "llama-perplexity"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class Frozen(BaseModel):
    """Data of a record: nothing unknown, nothing changed, nothing that is not finite."""

    # What is not finite is no number: the record that holds it cannot be read.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CellProfile(Frozen):
    """The KV profile (docs/explanation/kv-profile.md) that a cell's types come from.

    `types_k` and `types_v` are the types by layer as llama.cpp prints them ("turbo4:0,3-5 turbo3:1-2"),
    `bits_k` and `bits_v` their means per value.
    """

    sha256: str
    types_k: str
    types_v: str
    bits_k: float
    bits_v: float


class Cell(Frozen):
    """One measurement that is asked for. Sizes in tokens.

    `recent` and `first` are the exact window's sizes; 0 and 0: none. With a `profile`, `k` is the name of its
    file and `v` its bits, for people to read.
    `env` holds the GGML_* and LLAMA_* variables in force; `options` the metric's own settings.
    `engine` is part of the identity where it moves the number: llama-perplexity leaves tokens that f16 finds
    less likely than e^-16 out of a KL divergence, and has two tokens in a micro-batch where decoding has one.
    Perplexities agree to the digits it prints.
    """

    metric: str
    model: str
    model_sha256: str
    corpus: str
    corpus_sha256: str
    k: str
    v: str
    ctx: int
    chunks: int
    batch: int
    ubatch: int
    flash_attn: bool = True
    anchor: str = "off"
    anchor_sha256: str = ""
    recent: int = 0
    first: int = 0
    profile: CellProfile | None = None
    backend: str
    tree: str
    env: dict[str, str] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    engine: Engine = "llama-perplexity"

    def key(self) -> str:
        """Identity of the number: 16 hex digits over everything that can change it.

        Names are left out (content hashes stand for them); timeouts and threads are no part of a
        cell. The machine is the folder a record lies in.
        """
        return self._digest(exclude=_NAMES)

    def key_any_tree(self) -> str:
        """The same without the patched tree: finds records of another build (stale), which may have had
        another engine."""
        return self._digest(exclude=_NAMES | {"tree", "engine"})

    def comparison_key(self) -> str:
        """The same without K, V and the exact window: cells that may be compared with one another."""
        return self._digest(exclude=_NAMES | _PAIR | {"engine"})

    def text_key(self) -> str:
        """Without K, V, the exact window, metric and its options: one text through one build of one model."""
        return self._digest(exclude=_NAMES | _MEASURE | _PAIR)

    def reference_key(self) -> str:
        """Without all that is done to the cache: cells that have one reference."""
        return self._digest(exclude=_NAMES | _MEASURE | _CACHE)

    def batched(self, metric: str) -> Cell:
        """The batched run over the same text that a decode cell is compared with; any other cell itself."""
        if self.metric != "decode":
            return self
        options = self.options
        update = {"ubatch": options["batched_ubatch"], "chunks": options["batched_chunks"]}
        return self.model_copy(update=update | {"metric": metric, "options": {}})

    def pair(self) -> str:
        """ "K:V"."""
        return f"{self.k}:{self.v}"

    @property
    def window(self) -> Window:
        """The exact window that is asked for."""
        return Window(self.recent, self.first)

    def named(self) -> str:
        """ "K:V", with the exact window if there is one."""
        return self.pair() + (f" window {self.window}" if self.window else "")

    def _digest(self, exclude: frozenset[str] | set[str]) -> str:
        data = self.model_dump(mode="json", exclude=set(exclude))
        if self.engine == "llama-perplexity" or self.metric not in _OF_ENGINE:
            data.pop("engine", None)
        if self.anchor_sha256:
            data["anchor"] = ""  # a file is known by its content
        for name in _WINDOW:  # a cell without a window has the key that it had before there were any
            if data.get(name) == 0:
                del data[name]
        if self.profile is None:  # the same for profiles
            data.pop("profile", None)
        elif "profile" in data:  # its content stands for its name and all that follows from it
            data |= {"k": "", "v": "", "profile": self.profile.sha256}
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# Parts of a cell's identity. A new property of the cache belongs to _CACHE; to _PAIR, where it has a row of
# its own in a table.
_NAMES = frozenset({"model", "corpus"})
_MEASURE = frozenset({"metric", "options", "engine"})
_OF_ENGINE = frozenset({"kld", "decode"})  # metrics whose number depends on the engine
_WINDOW = frozenset({"recent", "first"})
_PAIR = _WINDOW | {"k", "v", "profile"}
_CACHE = _PAIR | {"anchor", "anchor_sha256"}
