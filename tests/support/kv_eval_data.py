"""A file of llama-kv-eval → the small file that the tests of the statistics resample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from turbo_eval.evidence.kv_eval import read_kv_eval


def main(source: Path, target: Path) -> None:
    """Floats in 16 bits: rounding is far below what a token's figure varies by."""
    found = read_kv_eval(source)
    base = found.figures(0)
    arrays: dict[str, Any] = {
        "token": base.token.astype(np.uint16),
        "reference.nll": base.nll.astype(np.float16),
        "reference.top": base.top.astype(np.uint16),
    }
    for number, run in enumerate(found.runs[1:], start=1):
        figures = found.figures(number)
        arrays[f"{run.spec}.delta"] = (figures.nll - base.nll).astype(np.float16)
        arrays[f"{run.spec}.kld"] = figures.kld.astype(np.float16)
        arrays[f"{run.spec}.top"] = figures.top.astype(np.uint16)
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
