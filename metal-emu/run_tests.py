"""`make test-metal`: everything the emulator can say about the Metal backend, with counts.

    run_tests.py --src TREE --bin DIR --out DIR [--model GGUF --text FILE] [--quick] [--jobs N]
                 [--only STEP ...]

TREE is the llama.cpp tree the emulator was built from, --bin the folder of its CPU build, --out the
emulator's build folder. Steps: `crosscheck` (names resolve), `ops` (llama.cpp's own test-backend-ops against
the CPU backend), `pairs` (every K/V pair against a reference in double, in three lane orders), `controls`
(planted faults must be caught), `model` (a whole model on the emulated device, its logits against the CPU's),
`archs` (small random models of several architectures with cache types, K anchor and exact window).

Exit code 0: all passed; 1: something failed; 2: something to run is missing.
"""

from __future__ import annotations

import argparse
import math
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
from statistics import fmean

HERE = Path(__file__).resolve().parent
STEPS = ("crosscheck", "ops", "pairs", "controls", "model", "archs")

# The whole-model step. How far the device's logits may be (mean KL divergence, nats) from the CPU's for these
# pairs, and from the CPU's with exact attention for all; how far a turbo pair's divergence from f16 may be
# from exact attention's, as a share of it.
MODEL_FROM_CPU = {"f16/f16": 1e-4, "q8_0/q8_0": 1e-4}
MODEL_FROM_EXACT = 2e-5
MODEL_ALIKE = 0.02
MODEL_PAIRS = (
    "f16/f16",
    "q8_0/q8_0",
    "q8_0/turbo4",
    "q8_0/turbo3",
    "turbo4/turbo4",
    "turbo3/turbo3",
    "turbo4/turbo3",
    "turbo3/turbo4",
    "turbo4/turbo4+32",
    "turbo3/turbo3+32",
)
MODEL_PAIRS_QUICK = ("f16/f16", "q8_0/q8_0", "turbo3/turbo4", "turbo3/turbo3+32")
# token:queries. Paths by number of queries: vec below 20, matrix below 32, dequantize-to-f16; 1 query beyond
# 1024 keys: the heads that share a KV head together
MODEL_PROBES = ("64:16", "96:24", "128:32", "160:16", "1100:1", "1101:1")
MODEL_PROBES_QUICK = ("64:16", "96:32")


# The step `archs`: plain, norms of Q and K, sliding windows, attention sinks, one matrix for Q, K and V
ARCHS = ("llama", "qwen2", "qwen3", "gemma3", "gpt-oss", "granite_swa", "phi3", "glm4")
ARCHS_QUICK = ("gpt-oss",)


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
        self.counts: dict[str, str] = {}  # by step, for the last line

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
        accepted = sum(int(n) for n in re.findall(r"^\S+\s+(\d+) accepted", text, re.M))
        self.counts["crosscheck"] = f"{accepted} combinations resolve"

    def ops(self) -> None:
        """llama.cpp's own test-backend-ops, the emulated device against the CPU backend."""
        turbo = "type_[KV]=turbo"
        runs = [
            ("SET_ROWS", ""),
            ("CPY", ""),
            ("GET_ROWS", ""),
            ("CONCAT", ""),  # puts a prompt's window together
            ("FLASH_ATTN_EXT", f"hsk=64,.*kv=113,.*{turbo}"),
        ]
        # with a second segment of keys and values
        window = "win=\\d+,type_win="
        if self.quick:
            runs.append(("FLASH_ATTN_EXT", f"{window}.*type_K=turbo3,type_V=turbo3,hsk=64,"))
        else:
            runs += [
                ("SOFT_MAX", ""),
                ("RMS_NORM", ""),
                ("FLASH_ATTN_EXT", f"hsk=(128|192|256),.*kv=113,.*{turbo}"),
                ("FLASH_ATTN_EXT", f"{window}.*type_V=(turbo|q8_0|f16)"),
                ("FLASH_ATTN_EXT", f"{window}.*type_V=(q4|q5|iq4)"),
            ]

        def one(run: tuple[str, str]) -> int:
            op, pattern = run
            argv = [str(self.bin / "test-backend-ops"), "test", "-b", "MTL0", "-o", op]
            # the slice over (Q, NE) of upstream's own vec kernels takes minutes and has no turbo type in it
            code, text = self.call(argv + (["-p", pattern] if pattern else []), LLAMA_TEST_FA_VEC_DISABLE="1")
            m = re.search(r"(\d+)/(\d+) tests passed", text)
            ok = code == 0 and m is not None and int(m.group(2)) > 0 and m.group(1) == m.group(2)
            last = [line for line in text.splitlines() if "FAIL" in line or "metal-emu:" in line]
            summary = f"{m.group(0) if m else 'no result'}{' ' + pattern if pattern else ''}"
            self.report(f"test-backend-ops {op}", ok, "; ".join([summary, *last[:3]]))
            return int(m.group(1)) if m else 0

        with ThreadPoolExecutor(self.jobs) as pool:
            self.counts["ops"] = f"{sum(pool.map(one, runs))} of llama.cpp's cases"

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
        orders: dict[str, list[int]] = {}
        for _, text in results:
            for order, runs, right in re.findall(
                r"^lane order (\w+): (\d+) executions, (\d+) right$", text, re.M
            ):
                t = orders.setdefault(order, [0, 0])
                t[0] += int(runs)
                t[1] += int(right)
        said = ", ".join(f"{order} {right} of {runs} right" for order, (runs, right) in orders.items())
        same = len(orders) == 3 and all(runs == right for runs, right in orders.values())
        self.report("pairs in every lane order", same, said)
        cases = sum(passed for passed, _ in totals.values())
        self.counts["pairs"] = f"{cases} cases, executions by lane order: {said}"

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

    def model(self) -> None:
        """A whole model, its weights in f16, on the emulated device and on the CPU.

        All sides decode the same tokens and read the bytes of one cache: caches of their own drift apart
        (docs/explanation/metal.md). The CPU backend has roundings of its own in the attention, so it is run a
        second time with attention in double: against that one the limits can be narrow.
        """
        if self.model_file is None or self.text is None:
            self.report("model", False, "needs --model and --text")
            return
        weights = self.out / "model-f16.gguf"
        if not weights.exists():
            part = weights.with_suffix(".part")
            argv = [str(self.bin / "llama-quantize"), "--allow-requantize"]
            code, text = self.call([*argv, str(self.model_file), str(part), "f16"])
            if code != 0:
                self.report("model", False, text.strip().splitlines()[-1])
                return
            part.rename(weights)
        pairs = MODEL_PAIRS_QUICK if self.quick else MODEL_PAIRS
        probes = MODEL_PROBES_QUICK if self.quick else MODEL_PROBES
        argv = [str(self.out / "metal-model"), "-m", str(weights), "-f", str(self.text)]
        argv += [a for side in ("exact", "cpu", "metal") for a in ("--side", side)]
        argv += [a for pair in pairs for a in ("--pair", pair)]
        argv += [a for probe in probes for a in ("--at", probe)]
        log = self.out / "model-kernels.txt"
        log.unlink(missing_ok=True)

        def one(i: int) -> tuple[int, str]:
            return self.call([*argv, "--shard", f"{i}/{self.jobs}"], METAL_EMU_LOG=str(log))

        with ThreadPoolExecutor(self.jobs) as pool:
            results = list(pool.map(one, range(self.jobs)))
        for code, text in results:
            if code != 0:
                self.report("model", False, "; ".join(text.strip().splitlines()[-3:]))
                return
        out = "\n".join(text for _, text in results)
        for pair in pairs:
            self.judge_model(pair, out)
        failed = sum(f"model {pair}" in self.failures for pair in pairs)
        self.counts["model"] = f"{len(pairs) - failed} of {len(pairs)} pairs on the whole model"
        kernels = log.read_text()
        wanted = ["_vec_pair_", "_kv_turbo4_f16"] + ([] if self.quick else ["_ext_pair_", "_gqa=3"])
        missing = [name for name in wanted if name not in kernels]
        self.report("model kernels", not missing, f"missing: {missing}" if missing else "all paths ran")

    def archs(self) -> None:
        """Whole small models against a cache of F32: llama.cpp's own test judges them."""
        names = ARCHS_QUICK if self.quick else ARCHS
        argv = [str(self.bin / "test-llama-archs"), "-kv", "-b", "MTL0", "-a", f"^({'|'.join(names)})$"]
        code, text = self.call(argv)
        m = re.search(r"Summary: (\d+) case\(s\), 0 failed", text)
        ran = set(re.findall(r"^\|([\w-]+)\|", text, re.M))
        bad = [line for line in text.splitlines() if "|FAIL|" in line or "metal-emu:" in line]
        self.report(
            "archs",
            code == 0 and m is not None and ran == set(names),
            "; ".join([*bad[:3], text.strip().splitlines()[-1]]),
        )
        self.counts["archs"] = f"{m[1] if m else 0} cases of {len(ran)} architectures"

    def judge_model(self, pair: str, out: str) -> None:
        """The verdict on one pair from metal-model's output."""

        def means(a: str, b: str) -> tuple[int, list[float]]:
            rows = re.findall(rf"^tok {re.escape(pair)} {a} {b} \d+ \d+ (\S+) (\S+) (\S+)$", out, re.M)
            return len(rows), [fmean(float(r[i]) for r in rows) if rows else math.nan for i in range(3)]

        tokens, (exact, base, device) = means("exact", "metal")
        _, (cpu, cpu_base, _) = means("cpu", "metal")
        ok = cpu <= MODEL_FROM_CPU.get(pair, math.inf) and exact <= MODEL_FROM_EXACT
        text = f"{tokens} tokens, KL divergence from the CPU {cpu:.1e}, from exact attention {exact:.1e}"
        if "turbo" in pair:
            off = device / base - 1
            ok = ok and abs(off) <= MODEL_ALIKE
            text += (
                f"; from f16 {device:.5f}, with exact attention {base:.5f} ({off:+.2%}), CPU {cpu_base:.5f}"
            )
        self.report(f"model {pair}", ok, text)

    def controls(self) -> None:
        """All planted faults."""
        plants = load_plants(self.quick)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.plant, plants))
        failed = sum(name.startswith("control: ") for name in self.failures)
        self.counts["controls"] = f"{len(plants) - failed} of {len(plants)} faults caught"


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
    counts = "".join(f"; {text}" for text in run.counts.values())
    print(f"test-metal: {verdict}{counts} ({time.monotonic() - start:.0f} s on {args.jobs} cores)")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
