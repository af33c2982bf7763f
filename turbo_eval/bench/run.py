"""Speed over depth: llama-bench for K/V pairs beside f16 of the same build, interleaved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.anchor.profile import Cache
from turbo_eval.formats.window import OFF, Window, resolve
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama import output
from turbo_eval.llama.backends import backend
from turbo_eval.llama.build import Build
from turbo_eval.metrics import judge
from turbo_eval.records.cell import Cell, CellProfile
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Effective, Record, Status
from turbo_eval.records.reference import EXACT, serves
from turbo_eval.records.speed import BenchRecord, key_of, write_speed
from turbo_eval.util.numbers import TokensOrAuto
from turbo_eval.util.process import child_environment, relevant_environment, run


@dataclass(frozen=True)
class Candidate:
    """What is measured: K, V, the K anchor and the exact window (None: the build has none), or a profile."""

    k: str
    v: str
    anchor: str | None
    window: Window | None
    profile: Path | None = None
    of_cell: CellProfile | None = None


@dataclass(frozen=True)
class BenchPlan:
    """Pairs × anchors × exact windows over depths, and f16/f16; `reps` interleaved rounds.

    `anchors` holds None alone where the build has no anchor; `windowed` says whether it has the exact window,
    whose sizes are `recent` and `first` tokens.
    """

    pairs: tuple[tuple[str, str], ...]
    depths: tuple[int, ...]
    prompt: int
    gen: int
    reps: int
    threads: int
    backend: str
    anchors: tuple[str | None, ...]
    timeout: float | None = None
    windowed: bool = False
    recent: tuple[TokensOrAuto, ...] = ("auto",)
    first: TokensOrAuto = "auto"
    profiles: tuple[Cache, ...] = ()

    def candidates(self) -> list[Candidate]:
        """f16/f16 first, each once."""
        off = OFF if self.windowed else None
        reference = Candidate(*EXACT, None if None in self.anchors else "off", off)
        others = [
            Candidate(k, v, anchor, resolve(recent, self.first, k, v) if self.windowed else None)
            for k, v in self.pairs
            if (k, v) != EXACT
            for anchor in self.anchors
            for recent in self.recent
        ]
        files = [
            Candidate(c.k, c.v, anchor, c.window, c.profile.path, c.of_cell())
            for c in self.profiles
            if c.profile is not None
            for anchor in self.anchors
        ]
        return list(dict.fromkeys([reference, *others, *files]))


@dataclass(frozen=True)
class _Sample:
    prefill: float | None
    decode: float | None
    effective: Effective
    argv: tuple[str, ...]
    started: str
    fault: tuple[Status, str] | None


def run_bench(
    plan: BenchPlan,
    model: ModelFile,
    build: Build,
    provenance: Provenance,
    folder: Path,
    say: Callable[[str], None],
) -> list[BenchRecord]:
    """Measure depth by depth, and within a depth round by round: f16, A, B, …, f16, A, B, …

    What disturbs a machine for a while then disturbs all pairs alike. A pair that fails once is not
    run again at that depth.

    Args:
        folder: where records and logs go.
        say: hears one line a run.

    Raises:
        EnvironmentProblem: no llama-bench, or the disk is full.
    """
    order = plan.candidates()
    records: list[BenchRecord] = []
    for depth in plan.depths:
        samples: dict[Candidate, list[_Sample]] = {candidate: [] for candidate in order}
        for round_number in range(plan.reps):
            for candidate in order:
                if any(s.fault for s in samples[candidate]):
                    continue
                sample = _run_once(plan, candidate, depth, model, build, folder)
                samples[candidate].append(sample)
                say(
                    f"depth {depth} round {round_number + 1}/{plan.reps} {_words(plan, candidate)}: "
                    + (_speeds(sample) if sample.fault is None else ": ".join(sample.fault))
                )
        for candidate in order:
            record = _record(plan, candidate, depth, samples, model, build, provenance)
            write_speed(folder, record)
            records.append(record)
    return records


def _words(plan: BenchPlan, candidate: Candidate) -> str:
    pair = candidate.k, candidate.v
    words = "/".join(pair) + (f" window {candidate.window}" if candidate.window else "")
    return f"{words} (anchor {candidate.anchor})" if len(plan.anchors) > 1 and pair != EXACT else words


def _speeds(sample: _Sample) -> str:
    parts = [(sample.prefill, "prefill"), (sample.decode, "decode")]
    return ", ".join(f"{name} {value:.1f} t/s" for value, name in parts if value is not None)


def bench_argv(plan: BenchPlan, candidate: Candidate, depth: int, model: Path, build: Build) -> list[str]:
    """The llama-bench command of one run. llama-bench reads no environment variables, so all is said here."""
    types = ["-ctk", candidate.k, "-ctv", candidate.v]
    if candidate.profile is not None:
        types = ["--kv-profile", str(candidate.profile)]
    argv = [str(build.tool("llama-bench")), "-m", str(model), *types, "-fa", "on"]
    if candidate.anchor is not None:
        argv += ["--kv-anchor", candidate.anchor]
    if candidate.window is not None:
        argv += ["--kv-recent", str(candidate.window.recent), "--kv-first", str(candidate.window.first)]
    argv += ["-p", str(plan.prompt), "-n", str(plan.gen), "-d", str(depth), "-r", "1"]
    argv += ["-t", str(plan.threads), "-o", "jsonl", "-v"]
    return argv + backend(plan.backend).bench_flags()


def _run_once(
    plan: BenchPlan, candidate: Candidate, depth: int, model: ModelFile, build: Build, folder: Path
) -> _Sample:
    k, v, anchor, window = candidate.k, candidate.v, candidate.anchor, candidate.window
    argv = bench_argv(plan, candidate, depth, model.path, build)
    env, _ = child_environment()
    wide = f".w{window}" if window else ""
    log = folder / "logs" / f"{model.name}.{k}-{v}{wide}.d{depth}.log".replace("/", "-")
    outcome = run(argv, log=log, env=env, timeout=plan.timeout)
    effective = output.parse_effective(outcome.text)
    fault = judge.judge_process(outcome, plan.timeout)
    if fault is None:
        cell = Cell(
            metric="ppl",
            model=model.name,
            model_sha256=model.sha256,
            corpus="",
            corpus_sha256="",
            k=k,
            v=v,
            ctx=0,
            chunks=0,
            batch=0,
            ubatch=0,
            anchor=anchor or "off",
            recent=window.recent if window else 0,
            first=window.first if window else 0,
            profile=candidate.of_cell,
            backend=plan.backend,
            tree=build.tree,
        )
        fault = judge.judge_state(cell, effective)
    speeds = _parse(outcome.text) if fault is None else {}
    if fault is None and not speeds:
        fault = ("no-result", output.last_error(outcome.text) or "llama-bench printed no speeds")
    return _Sample(
        speeds.get("prefill"), speeds.get("decode"), effective, tuple(argv), outcome.started, fault
    )


def _parse(text: str) -> dict[str, float]:
    """Mean tokens/s of the prefill and decode tests: llama-bench's JSON lines among its log."""
    speeds: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        try:
            test = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "avg_ts" not in test:
            continue
        if test["n_prompt"] and not test["n_gen"]:
            speeds["prefill"] = float(test["avg_ts"])
        elif test["n_gen"] and not test["n_prompt"]:
            speeds["decode"] = float(test["avg_ts"])
    return speeds


def _record(
    plan: BenchPlan,
    candidate: Candidate,
    depth: int,
    samples: dict[Candidate, list[_Sample]],
    model: ModelFile,
    build: Build,
    provenance: Provenance,
) -> BenchRecord:
    k, v, anchor, window = candidate.k, candidate.v, candidate.anchor, candidate.window
    own, exact = samples[candidate], samples[plan.candidates()[0]]
    fault = next((s.fault for s in own if s.fault), None)
    identity = {
        "model_sha256": model.sha256,
        "k": k,
        "v": v,
        "depth": depth,
        "prompt": plan.prompt,
        "gen": plan.gen,
        "backend": plan.backend,
        "threads": plan.threads,
        "anchor": anchor or "off",
        "tree": build.tree,
        "env": relevant_environment(),
        **({"recent": window.recent, "first": window.first} if window else {}),
        **({"profile": candidate.of_cell.model_dump()} if candidate.of_cell is not None else {}),
    }

    def speeds(of: Sequence[_Sample], name: str) -> tuple[float, ...]:
        return tuple(x for s in of if (x := getattr(s, name)) is not None)

    return BenchRecord(
        key=key_of(identity),
        model=model.name,
        status=fault[0] if fault else "ok",
        detail=fault[1] if fault else "",
        prefill=() if fault else speeds(own, "prefill"),
        decode=() if fault else speeds(own, "decode"),
        prefill_f16=speeds(exact, "prefill"),
        decode_f16=speeds(exact, "decode"),
        effective=own[0].effective,
        argv=own[0].argv,
        started=own[0].started,
        provenance=provenance,
        **identity,  # type: ignore[arg-type]
    )


def pair_label(record: BenchRecord, among: Sequence[BenchRecord]) -> str:
    """ "K/V" and its exact window, with the anchor where the pair is there with several."""
    window = Window(record.recent, record.first)
    anchors = {r.anchor for r in among if (r.k, r.v) == (record.k, record.v)}
    label = f"{record.k}/{record.v}" + (f" window {window}" if window else "")
    return label + (f" (anchor {record.anchor})" if len(anchors) > 1 else "")


def quality(record: BenchRecord, known: Sequence[Record]) -> Record | None:
    """The quality record of the same model, pair, anchor, build, machine and environment, best with a KLD."""
    matching = [
        r
        for r in known
        if r.ok
        and r.cell.metric in ("kld", "ppl")
        and (r.cell.model_sha256, r.cell.k, r.cell.v) == (record.model_sha256, record.k, record.v)
        and (r.cell.recent, r.cell.first, r.cell.profile) == (record.recent, record.first, record.profile)
        and (r.cell.tree, r.cell.backend, r.cell.env) == (record.tree, record.backend, record.env)
        and r.machine == record.provenance.machine.id
        and (r.cell.anchor == record.anchor or (record.anchor in ("auto", "off") and serves(r)))
    ]
    return max(matching, key=lambda r: (r.cell.metric == "kld", r.cell.ctx * r.cell.chunks), default=None)


def quality_words(found: Record | None) -> str:
    """The figure of a quality record and the text it is of."""
    if found is None or found.ppl is None:
        return UNVERIFIED
    kld = f", KLD {found.kld.mean:z.5f} from f16/f16" if found.kld else ""
    return f"PPL {found.ppl:.4f}{kld} ({found.cell.corpus}, {found.cell.chunks} × {found.cell.ctx})"


UNVERIFIED = "fast, but unverified"
