"""Figures of each token: a record's numbers follow from them, and their file is the one that was written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from turbo_eval.errors import IncompleteError, UsageError
from turbo_eval.evidence.position import over_position
from turbo_eval.evidence.tokens import Tokens, load, numbers, save
from turbo_eval.records.record import ByChunk, Kld

CHUNKS, SCORED, CTX = 6, 127, 256


def made(seed: int = 0, slope: float = 0.0) -> Tokens:
    """Figures whose KL divergence grows by `slope` from the first to the last scored token."""
    rng = np.random.default_rng(seed)
    shape = (CHUNKS, SCORED)
    base = rng.gamma(2, 1, shape).astype(np.float32)
    noise = rng.normal(0, 0.1, shape).astype(np.float32)
    kld = (noise**2 + slope * np.linspace(0, 1, SCORED)).astype(np.float32)
    top = rng.integers(0, 4, shape).astype(np.uint32)
    return Tokens(
        token=rng.integers(0, 4, shape).astype(np.uint32),
        nll=base + noise,
        top=top,
        kld=kld,
        dp=(noise / 10).astype(np.float32),
        base_nll=base,
        base_top=np.where(rng.random(shape) < 0.9, top, (top + 1) % 4).astype(np.uint32),
    )


def test_the_numbers_of_a_record() -> None:
    tokens = made()
    found = numbers(tokens)
    nll = tokens.nll.astype(np.float64)
    assert found["ppl"] == pytest.approx(np.exp(nll.mean()))
    assert found["running_ppl"][-1] == pytest.approx(found["ppl"]) and len(found["running_ppl"]) == CHUNKS
    assert found["running_ppl"][1] == pytest.approx(np.exp(nll[:2].mean()))
    kld, by_chunk = Kld.model_validate(found["kld"]), ByChunk.model_validate(found["by_chunk"])
    assert kld.mean == pytest.approx(tokens.kld.mean(), rel=1e-5)
    assert kld.max == pytest.approx(tokens.kld.max()) and kld.median < kld.p90 < kld.p99 < kld.p999 < kld.max
    assert kld.ratio == pytest.approx(found["ppl"] / kld.ppl_base, rel=1e-7)
    assert kld.same_top_pct == pytest.approx(100 * (tokens.top == tokens.base_top).mean())
    ratio = (nll - tokens.base_nll).mean(axis=1)
    assert kld.ln_ratio_err == pytest.approx(ratio.std(ddof=1) / np.sqrt(CHUNKS), rel=1e-4)
    assert np.subtract(by_chunk.nll, by_chunk.base_nll) == pytest.approx(ratio, abs=1e-7)
    before, after = tokens.base_top == tokens.token, tokens.top == tokens.token
    assert (by_chunk.lost, by_chunk.won) == ((before & ~after).sum(), (~before & after).sum())
    assert by_chunk.scored == CHUNKS * SCORED


def test_one_chunk_has_no_error_over_chunks() -> None:
    kld = Kld.model_validate(numbers(made().first(1))["kld"])
    assert kld.mean_err is None and kld.ratio_err is None and kld.same_top_pct_err is None


def test_chunks_joined_are_the_whole(tmp_path: Path) -> None:
    whole = made()
    rest = Tokens(**{name: getattr(whole, name)[2:] for name in whole.__dataclass_fields__})
    assert numbers(whole.first(2).then(rest)) == numbers(whole)
    alone = numbers(whole.reference())
    assert alone["kld"]["mean"] == 0 and alone["ppl"] == numbers(whole)["kld"]["ppl_base"]


def test_the_file_is_the_one_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tokens" / "key.npz"
    digest = save(made(), path)
    assert save(made(), path) == digest, "the same figures, the same bytes"
    assert numbers(load(path, digest)) == numbers(made())
    save(made(1), path)
    with pytest.raises(IncompleteError, match="is not the file that its record speaks of"):
        load(path, digest)
    path.unlink()
    with pytest.raises(IncompleteError, match="cannot be read"):
        load(path, digest)


def test_damage_that_grows_with_the_context_is_seen() -> None:
    spans = over_position(made(slope=0.1), CTX)
    assert (spans[0].first, spans[-1].last) == (CTX // 2 + 1, CTX - 1) and len(spans) == 8
    assert all(a.last + 1 == b.first for a, b in pairwise(spans))
    assert spans[-1].kld.low > spans[0].kld.high
    flat = over_position(made(), CTX)
    assert flat[-1].kld.low < flat[0].kld.high
    weighted = sum(s.kld.value * (s.last - s.first + 1) for s in flat) / SCORED
    assert weighted == pytest.approx(made().kld.mean(), rel=1e-5)
    with pytest.raises(UsageError):
        over_position(made(), CTX, spans=SCORED + 1)
