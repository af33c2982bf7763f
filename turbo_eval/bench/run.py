"""K/V pairs beside f16 of the same build, interleaved: rounds, resumption, records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_eval.bench.plan import TOOL, BenchPlan, Candidate, Step
from turbo_eval.bench.tools import Speeds, bench_argv, read_speeds
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama import output
from turbo_eval.llama.build import Build
from turbo_eval.metrics import judge
from turbo_eval.records.cell import Cell
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Effective, Status
from turbo_eval.records.reference import EXACT
from turbo_eval.records.speed import BenchRecord, find_speed, key_of, write_speed
from turbo_eval.util.process import child_environment, relevant_environment, run


@dataclass(frozen=True)
class _Sample:
    speeds: Mapping[int, Speeds]
    effective: Effective
    argv: tuple[str, ...]
    started: str
    fault: tuple[Status, str] | None


@dataclass(frozen=True)
class Schedule:
    """What of a plan is on record, and what is left to run.

    Attributes:
        left: for each step the candidates to run, f16/f16 first; none where all are on record.
        kept: records that stand for what is not run.
    """

    plan: BenchPlan
    left: tuple[tuple[Step, tuple[Candidate, ...]], ...]
    kept: Mapping[str, BenchRecord]

    def __str__(self) -> str:
        runs = [(step, len(order) * self.plan.reps) for step, order in self.left]
        loads = dict.fromkeys(
            f"{TOOL[s.workload]}, {s}: {n} runs" if n else f"{s}: on record" for s, n in runs
        )
        total = sum(n for _, n in runs)
        rounds = f"{self.plan.reps} round" + ("s" if self.plan.reps > 1 else "")
        kept = f"; {len(self.kept)} records kept" if self.kept else ""
        return f"{len(self.plan.candidates())} caches, {rounds}, {total} runs{kept} ({'; '.join(loads)})"


class Benchmark:
    """A plan for one model, build and machine.

    Args:
        folder: where records and logs go.
        fresh: measure again what is on record.
    """

    def __init__(
        self,
        plan: BenchPlan,
        model: ModelFile,
        build: Build,
        provenance: Provenance,
        folder: Path,
        *,
        fresh: bool = False,
    ) -> None:
        self.plan, self.model, self.build = plan, model, build
        self.provenance, self.folder, self.fresh = provenance, folder, fresh

    def schedule(self) -> Schedule:
        """What is on record with all its rounds is kept; what failed, or has fewer rounds, runs again beside
        f16/f16."""
        kept: dict[str, BenchRecord] = {}
        left = []
        reference, *others = self.plan.candidates()
        for step in self.plan.steps():
            missing = [c for c in others if not self._on_record(c, step, kept)]
            if missing or not self._on_record(reference, step, kept):
                for key in self._keys(reference, step):
                    kept.pop(key, None)
                left.append((step, (reference, *missing)))
            else:
                left.append((step, ()))
        return Schedule(self.plan, tuple(left), kept)

    def _on_record(self, candidate: Candidate, step: Step, kept: dict[str, BenchRecord]) -> bool:
        found = [find_speed(self.folder, key) for key in self._keys(candidate, step)]
        whole = [r for r in found if r is not None and r.status == "ok" and self._rounds(r) >= self.plan.reps]
        if self.fresh or len(whole) < len(step.sizes):
            return False
        kept.update((r.key, r) for r in whole)
        return True

    @staticmethod
    def _rounds(record: BenchRecord) -> int:
        return max(len(record.prefill), len(record.decode))

    def _keys(self, candidate: Candidate, step: Step) -> Iterator[str]:
        return (key_of(self._identity(candidate, step, size)) for size in step.sizes)

    def run(self, schedule: Schedule, say: Callable[[str], None]) -> list[BenchRecord]:
        """Measure step by step, and within a step round by round: f16, A, B, …, f16, A, B, …

        What disturbs a machine for a while then disturbs all pairs alike. A pair that fails once is not
        run again at that step. Records are written when a step is done.

        Args:
            say: hears one line a run.

        Returns:
            The records of the whole plan, kept ones among them.

        Raises:
            EnvironmentProblem: the tool is missing, or the disk is full.
        """
        known = dict(schedule.kept)
        for step, order in schedule.left:
            samples: dict[Candidate, list[_Sample]] = {candidate: [] for candidate in order}
            for round_number in range(self.plan.reps):
                for candidate in order:
                    if any(s.fault for s in samples[candidate]):
                        continue
                    sample = self._run_once(candidate, step)
                    samples[candidate].append(sample)
                    said = _spoken(sample) if sample.fault is None else ": ".join(sample.fault)
                    words = _words(self.plan, candidate)
                    say(f"{step} round {round_number + 1}/{self.plan.reps} {words}: {said}")
            for candidate in order:
                for size in step.sizes:
                    record = self._record(candidate, step, size, samples[candidate], samples[order[0]])
                    write_speed(self.folder, record)
                    known[record.key] = record
        wanted = (
            key
            for step in self.plan.steps()
            for size in step.sizes
            for candidate in self.plan.candidates()
            for key in [key_of(self._identity(candidate, step, size))]
        )
        return [known[key] for key in wanted]

    def _run_once(self, candidate: Candidate, step: Step) -> _Sample:
        argv = bench_argv(self.plan, candidate, step, self.model.path, self.build)
        env, _ = child_environment()
        wide = f".w{candidate.window}" if candidate.window else ""
        load = "" if step.workload == "depth" else f".{step.workload}"
        name = f"{self.model.name}.{candidate.k}-{candidate.v}{wide}.d{step.depth}{load}.log".replace(
            "/", "-"
        )
        outcome = run(argv, log=self.folder / "logs" / name, env=env, timeout=self.plan.timeout)
        effective = output.parse_effective(outcome.text)
        fault = judge.judge_process(outcome, self.plan.timeout)
        if fault is None:
            fault = judge.judge_state(self._asked(candidate), effective)
        speeds = read_speeds(outcome.text, step) if fault is None else {}
        if fault is None and (missing := [size for size in step.sizes if size not in speeds]):
            tool = TOOL[step.workload]
            of = "" if step.workload == "depth" else " for " + ",".join(map(str, missing))
            fault = ("no-result", output.last_error(outcome.text) or f"{tool} printed no speeds{of}")
        return _Sample(speeds, effective, tuple(argv), outcome.started, fault)

    def _asked(self, candidate: Candidate) -> Cell:
        """What has to run, for the judge."""
        window = candidate.window
        return Cell(
            metric="ppl",
            model=self.model.name,
            model_sha256=self.model.sha256,
            corpus="",
            corpus_sha256="",
            k=candidate.k,
            v=candidate.v,
            ctx=0,
            chunks=0,
            batch=0,
            ubatch=0,
            anchor=candidate.anchor or "off",
            recent=window.recent if window else 0,
            first=window.first if window else 0,
            profile=candidate.of_cell,
            backend=self.plan.backend,
            tree=self.build.tree,
        )

    def _identity(self, candidate: Candidate, step: Step, size: int) -> dict[str, Any]:
        """All that can change the speed."""
        window, of_draft = candidate.window, step.workload == "draft"
        return {
            "model_sha256": self.model.sha256,
            "k": candidate.k,
            "v": candidate.v,
            "depth": step.depth,
            "prompt": 0 if of_draft else self.plan.prompt,
            "gen": 0 if of_draft else self.plan.gen,
            "backend": self.plan.backend,
            "threads": self.plan.threads,
            "anchor": candidate.anchor or "off",
            "tree": self.build.tree,
            "env": relevant_environment(),
            **({"recent": window.recent, "first": window.first} if window else {}),
            **({"profile": candidate.of_cell.model_dump()} if candidate.of_cell is not None else {}),
            **({"workload": step.workload, "size": size} if step.workload != "depth" else {}),
        }

    def _record(
        self, candidate: Candidate, step: Step, size: int, own: Sequence[_Sample], exact: Sequence[_Sample]
    ) -> BenchRecord:
        fault = next((s.fault for s in own if s.fault), None)
        identity = self._identity(candidate, step, size)

        def speeds(of: Sequence[_Sample], name: str) -> tuple[float, ...]:
            found = (getattr(s.speeds[size], name) for s in of if size in s.speeds)
            return tuple(x for x in found if x is not None)

        return BenchRecord(
            key=key_of(identity),
            model=self.model.name,
            status=fault[0] if fault else "ok",
            detail=fault[1] if fault else "",
            prefill=() if fault else speeds(own, "prefill"),
            decode=() if fault else speeds(own, "decode"),
            prefill_f16=speeds(exact, "prefill"),
            decode_f16=speeds(exact, "decode"),
            effective=own[0].effective,
            argv=own[0].argv,
            started=own[0].started,
            provenance=self.provenance,
            **identity,
        )


def _words(plan: BenchPlan, candidate: Candidate) -> str:
    pair = candidate.k, candidate.v
    words = "/".join(pair) + (f" window {candidate.window}" if candidate.window else "")
    return f"{words} (anchor {candidate.anchor})" if len(plan.anchors) > 1 and pair != EXACT else words


def _spoken(sample: _Sample) -> str:
    """ "prefill 61.2 t/s, decode 9.8 t/s", for each size."""
    return "; ".join(
        (f"{size}: " if len(sample.speeds) > 1 else "")
        + ", ".join(
            f"{name} {value:.1f} t/s"
            for name, value in (("prefill", speeds.prefill), ("decode", speeds.decode))
            if value is not None
        )
        for size, speeds in sorted(sample.speeds.items())
    )
