"""The K projection bias of a model by layer and RoPE pair, read from its GGUF file.

A bias b is a constant before RoPE; after it, pair f of the key at position j holds b turned by
θ_f·j. What a constant anchor can remove of it depends on θ_f and on the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from turbo_eval.anchor.facts import NEIGHBOURS
from turbo_eval.errors import UsageError
from turbo_eval.inputs.gguf_info import read_gguf_info, read_numbers, read_vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

# tokens, or the context that the model was trained for, if that is less; n_ref in src/llama-kv-anchor.cpp
REFERENCE_LENGTH = 8192


@dataclass(frozen=True)
class KBias:
    """Biases of a model.

    Attributes:
        name: of the model.
        pairs: [layer, KV head, pair], the norm of the two bias values of a RoPE pair.
        theta: [pair], radians a position, fastest first.
        trained: tokens of context that the model was trained for; 0: not known.
    """

    name: str
    pairs: Array
    theta: Array
    trained: int = 0

    def largest(self) -> Array:
        """[layer], the largest pair norm."""
        return self.pairs.max(axis=(1, 2))  # type: ignore[no-any-return]

    def slow_share(self, ctx: int) -> Array:
        """[layer], the share of the bias's energy that a constant anchor takes out at `ctx` tokens.

        The anchor is llama.cpp's, see `anchor_phase`. 1 for a layer whose bias is zero.
        """
        taken = taken_share(self.theta, ctx, self.trained)
        energy = (self.pairs**2).sum(axis=1)
        total = energy.sum(axis=1)
        share: Array = np.divide(
            (energy * taken).sum(axis=1), total, out=np.ones_like(total), where=total > 0
        )
        return share


def mean_phase(theta: Array, length: float) -> NDArray[np.complex128]:
    """The mean of exp(iθj) over the positions j = 0 … length-1."""
    half = theta / 2
    phase: NDArray[np.complex128] = (
        np.exp(1j * half * (length - 1)) * np.sin(length * half) / (length * np.sin(half))
    )
    return phase


def anchor_phase(theta: Array, trained: int = 0) -> NDArray[np.complex128]:
    """The complex factor, by pair, that turns a bias into the anchor.

    It is the same for every context size, so that saved states fit all of them: the mean over
    positions, averaged over the lengths `REFERENCE_LENGTH`, half of it, … 256. The first is the
    context that the model was `trained` for, if that is shorter.
    """
    lengths = [min(REFERENCE_LENGTH, trained or REFERENCE_LENGTH)]
    while lengths[-1] // 2 >= 256:
        lengths.append(lengths[-1] // 2)
    phases: NDArray[np.complex128] = np.mean([mean_phase(theta, n) for n in lengths], axis=0)
    return phases


def taken_share(theta: Array, ctx: int, trained: int = 0) -> Array:
    """[pair], the share of a constant's energy that the anchor takes out at `ctx` tokens."""
    anchor = anchor_phase(theta, trained)
    share: Array = 2 * (np.conj(mean_phase(theta, ctx)) * anchor).real - np.abs(anchor) ** 2
    return share


def read_kbias(path: Path) -> KBias:
    """Read the biases of every layer.

    Raises:
        UsageError: no such model, or it has no K bias.
    """
    info = read_gguf_info(path)
    tensors = read_vectors(path, ".attn_k.bias")
    dim = info.head_dim_k
    theta = _theta(read_numbers(path), info.arch, dim)
    layers = []
    for layer in range(info.n_layer):
        tensor = tensors.get(f"blk.{layer}.attn_k.bias")
        if tensor is None:
            raise UsageError(
                f"{path} has no K projection bias in layer {layer}", "name a model such as Qwen2.5"
            )
        heads = np.asarray(tensor, dtype=np.float64).reshape(-1, dim)
        rotated = heads[:, : 2 * len(theta)]
        halves = (
            (rotated[:, 0::2], rotated[:, 1::2])
            if info.arch in NEIGHBOURS
            else (rotated[:, : len(theta)], rotated[:, len(theta) :])
        )
        layers.append(np.hypot(*halves))
    return KBias(info.name, np.array(layers), theta, info.n_ctx_train or 0)


def _theta(numbers: dict[str, float], arch: str, dim: int) -> Array:
    n_rot = int(numbers.get(f"{arch}.rope.dimension_count", dim))
    base = numbers.get(f"{arch}.rope.freq_base", 10000.0)
    return np.asarray(base ** (-2.0 * np.arange(n_rot // 2) / n_rot))


def table(bias: KBias, contexts: tuple[int, ...] = (512, 4096, 32768)) -> str:
    """Markdown: by layer the largest pair and what an anchor takes of the energy, by context."""
    head = "| layer | largest pair | " + " | ".join(f"taken at {c}" for c in contexts) + " |"
    lines = [head, "|---:" * (2 + len(contexts)) + "|"]
    shares = [bias.slow_share(c) for c in contexts]
    for layer, largest in enumerate(bias.largest()):
        cells = " | ".join(f"{share[layer]:.1%}" for share in shares)
        lines.append(f"| {layer} | {largest:.1f} | {cells} |")
    return "\n".join(lines)


def plot(biases: list[KBias], ctx: int = 512) -> Figure:
    """One panel a model: log10 of the largest bias over KV heads, by layer and pair.

    The line is where θ·ctx/2 = 0.7 rad: pairs beyond it hardly turn within `ctx` tokens.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 matplotlib takes half a second

    figure = Figure(figsize=(5.2 * len(biases), 4.2), layout="constrained")
    for axes, bias in zip(np.atleast_1d(figure.subplots(1, len(biases))), biases, strict=True):
        values = np.log10(np.maximum(bias.pairs.max(axis=1), 1e-2))
        image = axes.imshow(values, aspect="auto", cmap="magma", interpolation="nearest", vmin=-1, vmax=2.5)
        slow = int((bias.theta * ctx / 2 >= 0.7).sum())
        axes.axvline(slow - 0.5, color="white", linestyle="--", linewidth=1)
        axes.set_title(bias.name)
        axes.set_xlabel("RoPE pair (fast → slow)")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="log10 of the bias")
    return figure
