"""`python -m turbo_eval.selftest.worker '<JSON>'`: run checks, one JSON line before and after each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from turbo_eval.formats.window import Window
from turbo_eval.selftest.checks import run_checks
from turbo_eval.selftest.ggml import Ggml, GgmlError


def main() -> int:
    asked = json.loads(sys.argv[1])
    # ggml and its drivers may write to stdout; our lines go to the descriptor that was stdout.
    try:
        ggml = Ggml(Path(asked["bin_dir"]), asked["backend"], asked["device"])
    except GgmlError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps({"device": f"{ggml.device}: {ggml.description}"}), flush=True)
    for name, result in run_checks(ggml, asked["checks"], Window(*asked["window"])):
        line = {"check": name} | ({} if result is None else {"ok": result.ok, "detail": result.detail})
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
