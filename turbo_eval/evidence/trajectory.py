"""Figures of a cache along texts that f16/f16 generated. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbo_eval.evidence.paired import Interval, interval, kl_divergence
from turbo_eval.evidence.tokens import Tokens


@dataclass(frozen=True)
class Along:
    """How a cache does along trajectories.

    Attributes:
        kld: mean KL divergence over all positions, nats, with its interval over prompts.
        same_pct: share of positions at which it would have generated the same token, in percent.
        flips: index of the first token that it would have generated otherwise, by trajectory; None: none.
        free_pct: tokens before that, in percent of all: what it generates the same when it runs freely.
        length: tokens of a trajectory.
    """

    kld: Interval
    same_pct: Interval
    flips: tuple[int | None, ...]
    free_pct: float
    length: int


def along(tokens: Tokens, prompts: int) -> Along:
    """Sum up trajectories.

    Args:
        tokens: (trajectories, tokens), `top` being what each cache would have generated; the trajectories of
            one prompt stand `prompts` apart, and count as one observation.
    """
    same = tokens.top == tokens.base_top
    length = same.shape[1]
    flips = [int(np.argmin(row)) if not row.all() else None for row in same]
    by_prompt = tokens.kld.reshape(-1, prompts, length).swapaxes(0, 1).reshape(prompts, -1)
    share = same.reshape(-1, prompts, length).mean(axis=(0, 2))
    free = sum(length if flip is None else flip for flip in flips) / same.size
    scaled = interval(100 * share)
    return Along(kl_divergence(by_prompt), scaled, tuple(flips), 100 * free, length)
