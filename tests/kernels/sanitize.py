"""`make test-sanitize`: the exact window under AddressSanitizer and UBSan.

`python -m tests.kernels.sanitize BIN MODEL`: test-kv-window's random operations and small models, and
llama-completion on a whole model: decoding, a prompt longer than a ubatch, context shifts, a saved session.
Exit code 1 if one fails or a sanitizer has anything to say.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

COMPLAINT = re.compile(r"ERROR: (Address|Leak)Sanitizer|runtime error:|SUMMARY: \w+Sanitizer")
# Leaks at exit are not looked for: llama.cpp keeps what lives as long as the process.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(argv: list[str]) -> tuple[bool, str]:
    """Whether it ended well and no sanitizer complained; what it printed."""
    done = subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=os.environ | OPTIONS,
    )
    return done.returncode == 0 and not COMPLAINT.search(done.stdout), done.stdout


def commands(bin_dir: Path, model: str, folder: Path) -> dict[str, list[str]]:
    """By name."""
    prompt = "The lighthouse keeper wrote down the weather of every day. " * 12
    base = [str(bin_dir / "llama-completion"), "-m", model, "-p", prompt, "-no-cnv", "-fa", "on", "-t", "2"]
    base += ["--no-warmup", "--temp", "0", "-ub", "64", "-fit", "off", "-ctk", "turbo3"]
    session = ["--prompt-cache", str(folder / "session.bin"), "-c", "512", "-n", "8"]
    return {
        "window": [str(bin_dir / "test-kv-window"), "10000", "3"],
        "decode turbo3/turbo3": [*base, "-ctv", "turbo3", "-c", "512", "-n", "32"],
        "decode turbo3/turbo2, f16 window": [
            *(*base, "-ctv", "turbo2", "-c", "512", "-n", "16"),
            *("--kv-recent", "32", "--kv-recent-type", "f16"),
        ],
        "context shift": [
            *(*base, "-ctv", "turbo4", "-c", "256", "-n", "160", "--kv-recent", "32"),
            *("--context-shift", "--ignore-eos", "--keep", "4"),
        ],
        "session saved": [*base, "-ctv", "turbo3", *session],
        "session restored": [*base, "-ctv", "turbo3", *session],
    }


def main() -> int:
    bin_dir, model = Path(sys.argv[1]), sys.argv[2]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = commands(bin_dir, model, Path(folder))
        for name, argv in runs.items():
            ok, said = run(argv)
            wrong += not ok
            checks = len(re.findall(r": OK$", said, re.M))
            print(f"{'ok' if ok else 'FAIL'}  {name}" + (f": {checks} checks" if checks else ""), flush=True)
            if not ok:
                found = COMPLAINT.search(said)
                print(said[max(0, found.start() - 200) : found.start() + 4000] if found else said[-2000:])
    print(f"test-sanitize: {len(runs) - wrong} of {len(runs)} runs clean with AddressSanitizer and UBSan")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
