"""Mutated files for the readers of saved states and profiles: `python -m tests.sessions.fuzz --minutes 30`.

A good file is changed at random (bits, numbers at their limits, pieces cut, repeated or moved) and read by
llama-completion on a model of four layers. It may refuse the file, or read it where nothing that matters was
changed; it must end by itself, without a signal.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from resource import RLIMIT_AS, setrlimit

import numpy as np

from tests.support.layouts import LAYOUTS, write_model
from turbo_eval.inputs.kv_profile import Profile, model_shape, write_profile
from turbo_eval.llama.build import Build, find_build
from turbo_eval.util.process import child_environment

LIMITS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TYPES = (
    ["-ctk", "turbo3", "-ctv", "turbo3"],
    ["-ctk", "f16", "-ctv", "f16"],
    ["-ctk", "q8_0", "-ctv", "turbo4"],
)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to four changes; the beginning, where the numbers are, is hit more often."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            return bytes(out)
        reach = len(out) if rng.random() < 0.4 else min(len(out), 512)
        at, length = int(rng.integers(reach)), int(rng.integers(1, 64))
        match int(rng.integers(7)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at : at + 4] = int(rng.choice(LIMITS)).to_bytes(4, "little")
            case 2:
                out[at : at + 8] = int(rng.integers(2**63)).to_bytes(8, "little")
            case 3:
                del out[at:]
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length]
            case _:
                out[at : at + length] = rng.bytes(length)
    return bytes(out)


@dataclass
class Reader:
    """llama-completion on a small model, with a file it reads.

    Attributes:
        counts: how often it read, refused, crashed, or hung.
        crashes: the files that did it.
    """

    build: Build
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    crashes: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = write_model(LAYOUTS["qwen2"], self.folder / "model.gguf")

    def state(self, kind: int) -> bytes:
        """A saved state of that kind of cache."""
        path = self.folder / f"good-{kind}.state"
        if not path.is_file():
            done = self.run([*TYPES[kind], "--prompt-cache", str(path), "--prompt-cache-all"])
            assert done == 0 and path.is_file(), done
        return path.read_bytes()

    def profile(self) -> bytes:
        path = self.folder / "good.gguf"
        rng = np.random.default_rng(0)
        info = model_shape(self.model)
        statistics = {
            f"blk.{layer}.{name}": rng.uniform(0.5, 2.0, (2, 64)).astype(np.float16)
            for layer in range(info.n_layer)
            for name in ("k_mean", "k_std", "q_rms")
        }
        types = ["q8_0", "turbo4", "turbo3", "turbo2"]
        write_profile(Profile(types, types[::-1], 16, 2, statistics=statistics), info, path)
        return path.read_bytes()

    def run(self, options: list[str]) -> int:
        return self.completed(options).returncode

    def completed(self, options: list[str], memory: int | None = None) -> subprocess.CompletedProcess[str]:
        """The tool's end and output; `memory` is the address space that it may have, in bytes."""
        argv = [str(self.build.tool("llama-completion")), "-m", str(self.model), "-p", "abcdefghijklmnopqrst"]
        argv += ["-n", "1", "-c", "256", "-no-cnv", "-fa", "on", "--no-warmup", "--device", "none"]
        argv += ["-fit", "off", "-t", "1", "--temp", "0", *options]
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=60,
            env=child_environment()[0] | {"GGML_NO_BACKTRACE": "1"},
            preexec_fn=None if memory is None else partial(setrlimit, RLIMIT_AS, (memory, memory)),
        )

    def try_(self, data: bytes, options: list[str], name: str) -> int | None:
        """Its exit code on a file with that content, None if it hung; what it did is counted."""
        path = self.folder / "mutated"
        path.write_bytes(data)
        try:
            code = self.run([*options, str(path)])
        except subprocess.TimeoutExpired:
            code = None
        ended = "hung" if code is None else "read" if code == 0 else "refused" if code > 0 else "crashed"
        self.counts[ended] += 1
        if ended in ("hung", "crashed"):
            self.crashes.append(self.folder / f"crash-{name}-{len(self.crashes)}")
            self.crashes[-1].write_bytes(data)
        return code


def fuzz(reader: Reader, seed: int, *, seconds: float, most: int = 10**9) -> None:
    """States and profiles by turns."""
    rng, until = np.random.default_rng(seed), time.monotonic() + seconds
    for turn in range(most):
        if time.monotonic() > until:
            return
        if turn % 4 == 3:
            reader.try_(mutated(reader.profile(), rng), ["--kv-profile"], "profile")
        else:
            kind = turn % 4
            reader.try_(
                mutated(reader.state(kind), rng),
                [*TYPES[kind], "--prompt-cache-ro", "--prompt-cache"],
                "state",
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where files that crash it stay")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    reader = Reader(find_build("cpu"), folder)
    fuzz(reader, args.seed, seconds=60 * args.minutes)
    print(", ".join(f"{n} {what}" for what, n in reader.counts.most_common()))
    for path in reader.crashes:
        print(path)
    return 1 if reader.crashes else 0


if __name__ == "__main__":
    raise SystemExit(main())
