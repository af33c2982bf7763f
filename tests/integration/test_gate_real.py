"""The gate changes colour when one centroid of turbo4 moves by 20 %, without rebuilding: the table
is changed in a copy of the libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.harness import Cli
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities

MAGNITUDES = bytes([6, 18, 31, 45, 60, 77, 98, 127])  # kvalues_turbo4_mag in ggml-common.h
MOVED = bytes([6, 18, 31, 45, 60, 62, 98, 127])

CONFIG = """
[sweep]
pairs = ["f16:f16", "turbo4:turbo4"]
anchor = "off"
recent = 0
metrics = ["kld"]
ctx = 256
chunks = 2

[[check]]
name = "turbo4"
pair = "turbo4:turbo4"
max_kld = {bound}
"""


def with_moved_centroid(real: Path, folder: Path) -> Path:
    """A copy of the binaries whose codebook has 62 for 77."""
    folder.mkdir()
    changed = 0
    for file in real.iterdir():
        if file.is_symlink() or file.suffix == ".so" or ".so." in file.name:
            data = file.read_bytes()
            changed += data.count(MAGNITUDES)
            (folder / file.name).write_bytes(data.replace(MAGNITUDES, MOVED))
    for tool in ("llama-perplexity", "llama-kv-eval"):
        shutil.copy(real / tool, folder)
    assert changed, "the table is not where it was"
    return folder


def test_a_centroid_moved_by_a_fifth(
    tmp_path: Path, build: Build, smollm: ModelFile, prose: CorpusFile
) -> None:
    if "turbo4" not in capabilities(build).cache_types:
        pytest.skip("an unpatched build has no turbo4")
    if build.backend != "cpu":
        pytest.skip("the table of other backends lies in their kernels")
    cli = Cli(tmp_path / "results", build.bin_dir)
    config = tmp_path / "gate.toml"
    config.write_text(CONFIG.format(bound=1))
    swept = cli.sweep(config, "--json")
    assert swept.returncode == 0, swept.stderr
    kld = next(r["kld"]["mean"] for r in json.loads(swept.stdout) if r["k"] == "turbo4")
    assert 0.005 < kld < 0.1
    config.write_text(CONFIG.format(bound=1.2 * kld))

    def gate(bin_dir: Path) -> tuple[int, str]:
        done = cli.run("gate", config, "--bin-dir", bin_dir, "--results", cli.results)
        return done.returncode, done.stdout + done.stderr

    code, said = gate(build.bin_dir)
    assert code == 0 and "pass" in said

    moved = with_moved_centroid(build.bin_dir, tmp_path / "bin")
    code, said = gate(moved)
    assert code == 3 and "stale" in said, "the records are of another build"
    env = {"LD_LIBRARY_PATH": str(moved)}
    assert cli.sweep(config, bin_dir=moved, env=env).returncode == 0
    code, said = gate(moved)
    assert code == 1 and "KL divergence" in said and "is allowed" in said, said

    shutil.rmtree(cli.results)
    code, said = gate(build.bin_dir)
    assert code == 3 and "none of the cells has a record" in said
