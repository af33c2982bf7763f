"""`make test-metal`: everything the emulator can say about the Metal backend, with counts.

    run_tests.py --src TREE --bin DIR --out DIR [--model GGUF --text FILE] [--quick] [--jobs N]
                 [--only STEP ...]

TREE is the llama.cpp tree the emulator was built from, --bin the folder of its CPU build, --out the
emulator's build folder. Steps: `crosscheck` (names resolve), `ops` (llama.cpp's own test-backend-ops against
the CPU backend), `pairs` (every K/V pair against a reference in double, in three lane orders), `controls`
(planted faults must be caught), `model` (a whole model on the emulated device, its logits against the CPU's).

Exit code 0: all passed; 1: something failed; 2: something to run is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = ("crosscheck", "ops", "pairs", "controls", "model")

# The whole-model step compares these K/V pairs by their divergence from f16. It is the CPU's within 2 %, or
# within the standard error of the CPU's: over 64 positions 2 % are less than what another rounding of q makes
# of it (the CPU rounds q to 8 bits for a quantized K, Metal to half).
MODEL_TOLERANCE = 0.02
MODEL_DEVICES = {"cpu": "-ngl 0 -dev none", "emulated": "-ngl 99 -dev MTL0"}
MODEL_PAIRS = (
    "q8_0/turbo4",
    "q8_0/turbo3",
    "turbo4/turbo4",
    "turbo3/turbo3",
    "turbo4/turbo3",
    "turbo3/turbo4",
)


@dataclass(frozen=True)
class Plant:
    """A fault to plant in the sources and how it must show.

    The library with the fault must make `tool` exit with a failure whose output matches `shows`.
    """

    name: str
    file: str  # relative to ggml/src/ggml-metal
    old: str
    new: str
    objects: list[str]  # what to recompile
    tool: list[str]
    shows: str


def load_plants(quick: bool) -> list[Plant]:
    """The faults of plants.toml, or the reduced list."""
    with (HERE / "plants.toml").open("rb") as f:
        entries = tomllib.load(f)["plant"]
    return [Plant(**{k: v for k, v in e.items() if k != "quick"}) for e in entries if e["quick"] or not quick]


class Run:
    """One run of the steps; collects what failed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.src, self.bin, self.out = (p.resolve() for p in (args.src, args.bin, args.out))
        self.model_file: Path | None = args.model
        self.text: Path | None = args.text
        self.jobs: int = args.jobs
        self.quick: bool = args.quick
        self.failures: list[str] = []

    def call(self, argv: Sequence[str], lib: Path | None = None, **env: str) -> tuple[int, str]:
        """Run a tool with the emulated device loaded; return (exit code, output)."""
        full = {**os.environ, **env, "GGML_BACKEND_PATH": str(lib or self.out / "libggml-metal-emu.so")}
        p = subprocess.run(
            argv, env=full, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return p.returncode, p.stdout

    def report(self, name: str, ok: bool, text: str) -> None:
        """Print one verdict and remember a failure."""
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
        if not ok:
            self.failures.append(name)

    def crosscheck(self) -> None:
        """Every combination supports_op accepts resolves to a registered kernel."""
        code, text = self.call([str(self.out / "metal-crosscheck")])
        print(text, end="")
        self.report("crosscheck", code == 0, text.strip().splitlines()[-1] if text.strip() else "no output")

    def ops(self) -> None:
        """llama.cpp's own test-backend-ops, the emulated device against the CPU backend."""
        turbo = "type_[KV]=turbo"
        runs = [
            ("SET_ROWS", ""),
            ("CPY", ""),
            ("GET_ROWS", ""),
            ("FLASH_ATTN_EXT", f"hsk=64,.*kv=113,.*{turbo}"),
        ]
        if not self.quick:
            runs += [
                ("SOFT_MAX", ""),
                ("RMS_NORM", ""),
                ("FLASH_ATTN_EXT", f"hsk=(128|192|256),.*kv=113,.*{turbo}"),
            ]

        def one(run: tuple[str, str]) -> None:
            op, pattern = run
            argv = [str(self.bin / "test-backend-ops"), "test", "-b", "MTL0", "-o", op]
            # the slice over (Q, NE) of upstream's own vec kernels takes minutes and has no turbo type in it
            code, text = self.call(argv + (["-p", pattern] if pattern else []), LLAMA_TEST_FA_VEC_DISABLE="1")
            m = re.search(r"(\d+)/(\d+) tests passed", text)
            ok = code == 0 and m is not None and int(m.group(2)) > 0 and m.group(1) == m.group(2)
            last = [line for line in text.splitlines() if "FAIL" in line or "metal-emu:" in line]
            summary = f"{m.group(0) if m else 'no result'}{' ' + pattern if pattern else ''}"
            self.report(f"test-backend-ops {op}", ok, "; ".join([summary, *last[:3]]))

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(one, runs))

    def pairs(self) -> None:
        """The matrix of pairs, sharded over the cores."""
        extra = ["--quick"] if self.quick else []

        def one(i: int) -> tuple[int, str]:
            return self.call([str(self.out / "metal-pairs"), "--shard", f"{i}/{self.jobs}", *extra])

        with ThreadPoolExecutor(self.jobs) as pool:
            results = list(pool.map(one, range(self.jobs)))
        totals: dict[str, list[int]] = {}
        for code, text in results:
            found = re.findall(r"^(\S+)\s+(\d+) passed\s+(\d+) failed$", text, re.M)
            for op, passed, failed in found:
                t = totals.setdefault(op, [0, 0])
                t[0] += int(passed)
                t[1] += int(failed)
            if code != 0 or not found:
                print("\n".join(text.splitlines()[-25:]))
                self.failures.append("pairs shard")
        for op, (passed, failed) in totals.items():
            self.report(f"pairs {op}", failed == 0 and passed > 0, f"{passed} passed, {failed} failed")
        print("\n".join(t.strip().splitlines()[-1] for _, t in results if t.strip()))

    def plant(self, plant: Plant) -> None:
        """Build the library with one fault and demand that it is caught."""
        work = self.out / "planted" / re.sub(r"\W+", "-", plant.name)[:40]
        shutil.rmtree(work, ignore_errors=True)
        tree = work / "src"
        metal = tree / "ggml/src/ggml-metal"
        shutil.copytree(self.src / "ggml/src/ggml-metal", metal)
        for path in (self.src / "ggml/src").iterdir():
            if path.name != "ggml-metal":
                (tree / "ggml/src" / path.name).symlink_to(path.resolve())
        (tree / "ggml/include").symlink_to((self.src / "ggml/include").resolve())
        text = (metal / plant.file).read_text()
        if text.count(plant.old) != 1:
            self.report(
                f"control: {plant.name}", False, f"{plant.file} has changed, the fault cannot be planted"
            )
            return
        (metal / plant.file).write_text(text.replace(plant.old, plant.new))
        make = [
            "make",
            "-s",
            "-C",
            str(HERE),
            f"SRC={tree.resolve()}",
            f"BIN={self.bin.resolve()}",
            f"OUT={(work / 'out').resolve()}",
        ]
        make += [f"REUSE={self.out.resolve()}", f"PLANTED={' '.join(plant.objects)}", "lib"]
        built = subprocess.run(make, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if built.returncode != 0:
            self.report(f"control: {plant.name}", False, "does not build: " + built.stdout[-500:])
            return
        lib = work / "out/libggml-metal-emu.so"
        code, out = self.call([str(self.out / plant.tool[0]), *plant.tool[1:]], lib=lib)
        m = re.search(plant.shows, out)
        shown = next((line for line in out.splitlines() if re.search(plant.shows, line)), out[-200:])
        self.report(
            f"control: {plant.name}",
            code != 0 and m is not None,
            ("caught: " if m else "NOT caught: ") + shown.strip()[:160],
        )
        shutil.rmtree(work, ignore_errors=True)

    def kld(
        self, device: str, pair: str, base: Path, ubatch: int = 16, save: bool = False
    ) -> tuple[float, float]:
        """Mean KL divergence of the logits on `device` with cache types `pair` from those in `base`, nats.

        Returns it with its standard error over the positions. Below 20 tokens a ubatch the vec kernels run,
        above 31 the dequantize-to-f16 path. With `save`, write `base` and return zeros. NaN when the output
        has no number.
        """
        k, v = pair.split("/")
        weights = self.out / "model-f16.gguf"
        argv = [
            str(self.bin / "llama-perplexity"),
            "-m",
            str(weights),
            "-f",
            str(self.text),
            "-ub",
            str(ubatch),
        ]
        argv += ["-c", "128", "--chunks", "1", "-b", "128", "-fa", "on", "-t", "1", "--no-warmup"]
        argv += ["-ctk", k, "-ctv", v, *(MODEL_DEVICES[device].split())]
        argv += ["--kl-divergence-base", str(base), *([] if save else ["--kl-divergence"])]
        code, text = self.call(argv)
        if code == 0 and save and base.stat().st_size > 0:
            return 0.0, 0.0
        m = re.search(r"^\s+1\s+\S+ ±\s+\S+\s+\S+ ±\s+\S+\s+(\S+) ±\s+(\S+)", text, re.M)
        if code != 0 or m is None:
            print("\n".join(text.splitlines()[-8:]))
            return float("nan"), float("nan")
        return float(m.group(1)), float(m.group(2))

    def model(self) -> None:
        """The whole model on the emulated device, decoding with the vec kernels.

        The weights are made f16: the CPU multiplies quantized weights with 8-bit activations, Metal with
        half ones, which would hide what is compared here.
        """
        if self.model_file is None or self.text is None:
            self.report("model", False, "needs --model and --text")
            return
        weights = self.out / "model-f16.gguf"
        if not weights.exists():
            part = weights.with_suffix(".part")
            argv = [
                str(self.bin / "llama-quantize"),
                "--allow-requantize",
                str(self.model_file),
                str(part),
                "f16",
            ]
            code, text = self.call(argv)
            if code != 0:
                self.report("model", False, text.strip().splitlines()[-1])
                return
            part.rename(weights)
        base = {d: self.out / f"{d}-f16.kld" for d in ("cpu", "emulated")}
        cpu_q8 = self.out / "cpu-q8_0.kld"
        with ThreadPoolExecutor(self.jobs) as pool:
            saves = [("cpu", "f16/f16", base["cpu"]), ("emulated", "f16/f16", base["emulated"])]
            saves += [("cpu", "q8_0/q8_0", cpu_q8)]
            list(pool.map(lambda a: self.kld(a[0], a[1], a[2], save=True), saves))

            def same(job: tuple[str, Path, float]) -> None:
                pair, other, limit = job
                value, _ = self.kld("emulated", pair, other)
                text = f"KL divergence from the CPU's logits {value:.5f}, limit {limit}"
                self.report(f"model {pair}", value <= limit, text)

            # 8-bit q on the CPU: q8_0/q8_0 is 1.6e-4 from f16 there, 1.1e-4 here, and the two 2.2e-4 apart
            list(pool.map(same, [("f16/f16", base["cpu"], 1e-4), ("q8_0/q8_0", cpu_q8, 5e-4)]))

            def alike(job: tuple[str, int]) -> None:
                pair, ubatch = job
                a, sa = self.kld("cpu", pair, base["cpu"], ubatch)
                b, sb = self.kld("emulated", pair, base["emulated"], ubatch)
                text = f"KL divergence from f16 {b:.5f} ± {sb:.5f}, on the CPU {a:.5f} ± {sa:.5f}"
                ok = abs(b - a) <= max(MODEL_TOLERANCE * a, sa)
                self.report(f"model {pair} ubatch={ubatch}", ok, text)

            jobs = [(pair, 16) for pair in (MODEL_PAIRS[:1] if self.quick else MODEL_PAIRS)]
            list(pool.map(alike, jobs if self.quick else [*jobs, ("turbo4/turbo4", 128)]))

    def controls(self) -> None:
        """All planted faults."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.plant, load_plants(self.quick)))


def main() -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Run the Metal backend on the CPU and judge it.")
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a small GGUF for the step `model`")
    parser.add_argument("--text", type=Path, help="a text of a few thousand characters for the step `model`")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a reduced list, about 3 minutes on 2 cores")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    args = parser.parse_args()
    for path in (args.out / "libggml-metal-emu.so", args.out / "metal-pairs", args.bin / "test-backend-ops"):
        if not path.exists():
            print(
                f"test-metal: {path} does not exist; run `make build-cpu` and `make metal-emu` first",
                file=sys.stderr,
            )
            return 2
    run = Run(args)
    start = time.monotonic()
    for step in args.only:
        before = time.monotonic()
        getattr(run, step)()
        print(f"     {step}: {time.monotonic() - before:.0f} s", flush=True)
    verdict = "all passed" if not run.failures else f"{len(run.failures)} failed: " + "; ".join(run.failures)
    print(f"test-metal: {verdict} ({time.monotonic() - start:.0f} s on {args.jobs} cores)")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
