"""KL divergence over the distance from the start of the context: does the damage grow as the cache fills?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from turbo_eval.errors import UsageError
from turbo_eval.evidence.paired import Interval, interval, kl_divergence
from turbo_eval.evidence.tokens import Tokens


@dataclass(frozen=True)
class Span:
    """Tokens with `first` to `last` tokens before them in their chunk; intervals over chunks of 95 %.

    `kld` in nats, `delta_pct` the change of perplexity in percent, both against f16/f16.
    """

    first: int
    last: int
    kld: Interval
    delta_pct: Interval


def over_position(tokens: Tokens, ctx: int, spans: int = 8) -> list[Span]:
    """Spans of equal length over the scored tokens, which are those after the first half of a context.

    Args:
        ctx: tokens of a chunk.

    Raises:
        UsageError: there are fewer scored tokens than spans.
    """
    scored = tokens.kld.shape[1]
    if not 1 <= spans <= scored:
        raise UsageError(f"{scored} scored tokens cannot be cut into {spans} spans")
    start = ctx // 2 + 1  # tokens before the first that is scored
    cuts = np.linspace(0, scored, spans + 1).round().astype(int)
    found = []
    for low, high in pairwise(cuts.tolist()):
        ratio = (tokens.nll[:, low:high].astype(np.float64) - tokens.base_nll[:, low:high]).mean(axis=1)
        found.append(
            Span(
                first=start + low,
                last=start + high - 1,
                kld=kl_divergence(tokens.kld[:, low:high]),
                delta_pct=interval(ratio).percent(),
            )
        )
    return found
