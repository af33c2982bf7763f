"""The KV profiles in configs/profiles: whole, for models of the registry, with proof."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from turbo_eval.anchor.profile import mean_bits
from turbo_eval.formats.cache_types import cache_type
from turbo_eval.inputs.corpora import default_name
from turbo_eval.inputs.kv_profile import read_profile
from turbo_eval.inputs.models import registry
from turbo_eval.util.paths import configs_dir

FILES = sorted((configs_dir() / "profiles").glob("*.gguf"))


def test_there_are_some() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_whole(path: Path) -> None:
    file = read_profile(path)
    own = file.profile
    assert path.stat().st_size < 200_000
    assert own.provenance["model.name"] in registry() and file.name.startswith(own.provenance["model.name"])
    assert len(own.provenance["model.sha256"]) == len(own.provenance["corpus.sha256"]) == 64
    assert {cache_type(t).name for t in (*own.k, *own.v)} == {*own.k, *own.v}
    assert own.bits == pytest.approx((mean_bits(own.k) + mean_bits(own.v)) / 2)
    assert own.held_out is not None and math.isfinite(own.held_out) and own.held_out > 0
    # what `make profiles` asks of tune
    assert (own.recent, own.first, own.recent_type) == (128, 4, "q8_0")
    assert own.provenance["corpus.name"] == default_name()
    assert own.provenance["found_on"] == "1 x 2048 tokens"
    assert own.provenance["model.weights"] == "dequantized"
    asked = float(file.name.removesuffix(".kv-profile.gguf").rpartition("-")[2])
    assert own.bits is not None and asked - 0.05 < own.bits <= asked
    layers = range(file.shape.n_layer)
    assert {*own.statistics} == {f"blk.{n}.{name}" for n in layers for name in ("k_mean", "k_std", "q_rms")}
    for name, values in own.statistics.items():
        assert np.isfinite(values).all() and (name.endswith("k_mean") or (values > 0).all())
