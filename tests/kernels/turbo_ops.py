"""Run test-backend-ops on the turbo types and the window: `python -m tests.kernels.turbo_ops`.

Exit 1 when one fails, or when there are patches and yet not a single case ran.
"""

from __future__ import annotations

import re
import subprocess
import sys

from turbo_eval.llama.build import find_build
from turbo_eval.llama.patches import read_series


def run(backend: str = "CPU", params: str = "turbo[234]|win=") -> tuple[int, int, str]:
    """(passed, total, output) of the cases whose parameters match the regex `params`."""
    tool = find_build("cpu").tool("test-backend-ops")
    done = subprocess.run(
        [tool, "test", "-b", backend, "-p", params],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    counts = re.search(r"(\d+)/(\d+) tests passed", done.stdout)
    passed, total = (int(counts[1]), int(counts[2])) if counts else (0, 0)
    if done.returncode != 0 and passed == total:
        total += 1  # it died before it could count the case that killed it
    return passed, total, done.stdout


def main() -> int:
    passed, total, output = run()
    wrong = passed < total or (total == 0 and bool(read_series()))
    if wrong:
        print("\n".join(line for line in output.splitlines() if "OK" not in line))
    print(f"test-backend-ops, turbo types and window on the CPU: {passed}/{total} passed")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
