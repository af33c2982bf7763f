"""The order of nodes for fused writes to the KV cache is for devices that fuse by it, and not for CPUs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from turbo_eval.inputs.synthetic import parse_shape, synthetic_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.tool import capabilities

NODE = re.compile(r"node #\s*\d+ \(\s*(\w+)\):\s+(\S+)")


def test_upstream_order_on_the_cpu(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q is rotated before K and V are projected, and both writes come after both rotations."""
    if not capabilities(build).kv_anchor:
        pytest.skip("an unpatched build has no K anchor")
    monkeypatch.setenv("TURBO_EVAL_CACHE", str(tmp_path))
    model = synthetic_model(parse_shape("tiny,arch=qwen2"))
    bench: list[str | Path] = [
        build.tool("llama-bench"),
        "-m",
        model,
        "-p",
        "0",
        "-n",
        "1",
        "-r",
        "1",
        "-t",
        "1",
        "-fa",
        "1",
    ]
    done = subprocess.run(
        [*bench, "-ctk", "turbo3", "-ctv", "turbo3", "-v"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"GGML_SCHED_DEBUG": "2"},
    )
    nodes = [f"{op} {name}" for op, name in NODE.findall(done.stdout + done.stderr)]
    layer = nodes[nodes.index("MUL_MAT Qcur-0") :]
    layer = layer[: next(i for i, node in enumerate(layer) if node.startswith("FLASH_ATTN"))]
    order = [node.split()[0] for node in layer]
    rotated = ["MUL_MAT", "ADD", "ROPE", "MUL", "MUL_MAT"]  # projection, bias, RoPE, balance, rotation
    assert order[:5] == rotated and layer[5].startswith("MUL_MAT Vcur"), layer
    assert order[5:8] == ["MUL_MAT", "ADD", "MUL_MAT"], layer
    assert order[8:14] == [*rotated[:4], "ADD", "MUL_MAT"] and layer[8].startswith("MUL_MAT Kcur"), layer
    assert [node for node in order[14:] if node == "SET_ROWS"] == ["SET_ROWS"] * 4, layer
