"""Run a plan on a cluster: hand out cells, take in records, and give back what was lost.

Everything that is decided is decided here, in the client; workers answer requests. A cell is in one
of these states: pending (placement), in flight (asked for), held (waits for a file to be sent),
done (on record).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from turbo_eval.errors import EnvironmentProblem, IncompleteError
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record
from turbo_eval.scale.client.cluster import Answered, Cluster, Failed, Said
from turbo_eval.scale.client.crew import Crew
from turbo_eval.scale.client.ledger import Ledger
from turbo_eval.scale.client.placement import Group, Placement
from turbo_eval.scale.client.request import fault_of, measure_request, memory_gib, needs_of, progress_of
from turbo_eval.scale.client.transfers import Transfers
from turbo_eval.scale.wire import Measured, Need, Source, read
from turbo_eval.sweep.plan import Plan
from turbo_eval.sweep.run import InterruptedSweepError, Reporter, SweepResult

# Cells a worker is given at a time. One, so that none waits at a busy worker while another is idle; if
# they are so short that fetching the next would be felt, some more. Bounded in any case, and with it
# what client and scheduler hold.
IN_FLIGHT = 3
SHORT = 2.0  # seconds
_LOOK = 1.0  # seconds between looks at who is there


@dataclass
class _Flight:
    """A cell that was asked for. `began`: where its worker said that it started."""

    number: int
    machine: str
    workers: tuple[str, ...]
    lock: ExitStack
    began: str = ""


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for a worker that can take what is left, and how often a cell is tried again."""

    seconds: float = 60.0
    retries: int = 2


def run_on_cluster(
    plan: Plan,
    provenance: Provenance,
    results: Path,
    reporter: Reporter,
    cluster: Cluster,
    *,
    fresh: bool = False,
    patience: Patience = Patience(),
) -> SweepResult:
    """As `run_sweep`, on the workers of `cluster`.

    Records go into the folder of the machine that measured them, written by this process alone.

    Raises:
        InterruptedSweepError: Ctrl-C.
        IncompleteError: no worker can take what is left; says who was refused and why.
        EnvironmentProblem: the scheduler is gone, the disk is full, or workers fail one after another.
    """
    return _Run(plan, provenance, results, reporter, cluster, fresh, patience).run()


class _Run:
    def __init__(
        self,
        plan: Plan,
        provenance: Provenance,
        results: Path,
        reporter: Reporter,
        cluster: Cluster,
        fresh: bool,
        patience: Patience,
    ) -> None:
        self.plan, self.reporter, self.cluster = plan, reporter, cluster
        self.fresh, self.patience = fresh, patience
        build = plan.build
        self.source = Source(
            backend=plan.spec.backend,
            tree=build.tree,
            pin=build.pin,
            series=provenance.series,
            dirty=build.dirty,
        )
        same: dict[tuple[Need, ...], tuple[Need, ...]] = {}  # one tuple a combination of files
        self.needs = [same.setdefault(needs, needs) for needs in map(needs_of, plan.jobs)]
        self.placement = Placement(plan.cells(), [memory_gib(job) for job in plan.jobs])
        self._id = uuid4().hex
        every = {need.sha256: need for some in self.needs for need in some}
        self.ledger = Ledger(results, provenance.machine.id, plan.jobs)
        self.crew = Crew(cluster, self.source, every.values(), reporter, self._id)
        self.transfers = Transfers(
            cluster, self.crew, reporter, self._id, self.placement.give_back, patience.retries
        )
        self.told: set[str] = set()
        self.flights: dict[str, _Flight] = {}
        self.attempts: Counter[int] = Counter()
        self.asked: Counter[int] = Counter()
        self.deferred: dict[int, float] = {}  # cells that another sweep runs: when to look again
        self.waited: set[int] = set()  # for such cells
        self._pace = SHORT  # seconds of the last cells, roughly
        self._looked = 0.0
        self._useful = time.monotonic()  # when a worker was last there for what is left

    def run(self) -> SweepResult:
        try:
            self._recall()
            while self.placement.left:
                self._look()
                self._fill()
                event = self.cluster.next(0.2 if self.deferred else _LOOK)
                while event is not None:
                    self._handle(event)
                    self._fill()
                    event = self.cluster.next(0) if self.placement.left else None
        except KeyboardInterrupt:
            raise InterruptedSweepError(
                f"interrupted; {len(self.ledger.records)} of {len(self.plan.jobs)} cells are on record",
                "run the same command again to go on",
            ) from None
        finally:
            for key, flight in self.flights.items():
                self.cluster.cancel(key)
                flight.lock.close()
        records = self.ledger.records
        return SweepResult([records[n] for n in sorted(records)], self.ledger.reused)

    # -- what is on record ------------------------------------------------------------------------

    def _recall(self) -> None:
        """Comparisons that one machine has whole are done."""
        if self.fresh:
            return
        for number, record in self.ledger.whole(self.placement.groups.values()).items():
            group = self.placement.group_of(number)
            group.pending.remove(number)
            self._finish(number, record, reused=True)

    def _may(self, group: Group, machine: str) -> bool:
        """Where a part is on record, only that class may go on, as long as it has a worker here."""
        has_part = self.ledger.partly.get(group.name, set())
        return machine in has_part or not (has_part & self.crew.machines())

    # -- who is there -----------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        for address, worker in self.crew.look().items():
            self.transfers.drop(address)
            if worker.machine not in self.crew.machines():
                self.placement.release(worker.machine)
        for key, flight in list(self.flights.items()):
            if not any(address in self.crew.workers for address in flight.workers):
                self._lost(key, flight, "every worker that it was given to is gone")
        self._be_patient(now)

    def _be_patient(self, now: float) -> None:
        """Someone must be there who works or may come to."""
        if self.flights or self.transfers or self.deferred or self.crew.undecided:
            self._useful = now
        elif now - self._useful > self.patience.seconds:
            reasons = list(dict.fromkeys(self.crew.troubles))
            why = "; ".join(reasons[-3:]) if reasons else self._who_is_there()
            raise IncompleteError(
                f"no worker can take the {self.placement.left} cells that are left: {why}",
                "repair or add one and run the same command again",
            )

    def _who_is_there(self) -> str:
        welcome = self.crew.welcome()
        if not welcome:
            return f"{self.cluster.address} has no worker for {self.source.backend}"
        waiting = [g for g in self.placement.groups.values() if g.pending]
        most = max(self.crew.memory_gib(addresses[0]) for addresses in welcome.values())
        large = [g for g in waiting if g.memory_gib > most]
        if large:
            return f"they need {large[0].memory_gib:.1f} GiB of device memory, the largest has {most:.1f}"
        classes = {g.machine for g in waiting if g.machine}
        return f"their comparison was begun on {', '.join(sorted(classes))}, which has no worker now"

    # -- asking -----------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Keep every welcome worker supplied."""
        self._look_again()
        depth = IN_FLIGHT if self._pace < SHORT else 1
        for machine, addresses in self.crew.welcome().items():
            memory = self.crew.memory_gib(addresses[0])
            room = depth * len(addresses) - sum(f.machine == machine for f in self.flights.values())
            while room > 0:
                number = self.placement.take(machine, memory, self._may)
                if number is None:
                    break
                self._tell_of_parts(number, machine)
                room -= self._start(number, machine, addresses)

    def _tell_of_parts(self, number: int, machine: str) -> None:
        """A comparison that was begun elsewhere is measured anew, and not in silence."""
        group = self.placement.group_of(number).name
        has_part = self.ledger.partly.get(group, set())
        if has_part and machine not in has_part and group not in self.told:
            self.told.add(group)
            other = ", ".join(sorted(has_part))
            self.reporter.note(
                f"a part of the comparison of cell {number + 1} is on record for {other}, which has no worker"
                f" here: all of it is measured on {machine}"
            )

    def _look_again(self) -> None:
        now = time.monotonic()
        for number, when in list(self.deferred.items()):
            if now >= when:
                del self.deferred[number]
                self.placement.give_back(number)

    def _start(self, number: int, machine: str, addresses: list[str]) -> int:
        """Ask for a cell, unless it is on record or another sweep has it; how many requests it was."""
        job, store = self.plan.jobs[number], self.ledger.store(machine)
        lock = ExitStack()
        if not lock.enter_context(store.lock(job.cell, wait=False)):
            lock.close()
            if number not in self.waited:
                self.reporter.waiting(number, job)
            self.waited.add(number)
            self.deferred[number] = time.monotonic() + 1.0
            return 0
        known = None if self.fresh and number not in self.waited else store.load(job.cell)
        if known is not None and known.ok:
            lock.close()
            self._finish(number, known, reused=True)
            return 0
        known_references = self.ledger.references(job.cell, machine)
        request = measure_request(job, self.plan.spec, self.source, self.needs[number], known_references)
        # The same request has the same name, so that a sweep that was cut off and started again takes
        # up the cell that is still running; asked again, it is another one.
        text = request.model_dump_json() + (self._id if self.fresh else "")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = f"turbo-eval-{job.cell.key()}-{digest}-{self.asked[number]}"
        self.asked[number] += 1
        request = request.model_copy(update={"ticket": key})
        resources = {self.source.backend: 1.0}
        self.flights[key] = _Flight(number, machine, tuple(addresses), lock)
        self.cluster.ask(key, request.model_dump_json(), addresses, resources=resources)
        return 1

    # -- hearing ----------------------------------------------------------------------------------

    def _handle(self, event: Answered | Failed | Said) -> None:
        if isinstance(event, Said):
            self._hear(event.message)
        elif (address := self.crew.asked_for(event.key)) is not None:
            self.crew.answered(address, event)
        elif event.key in self.transfers:
            self.transfers.answered(event.key, event)
        elif event.key in self.flights:
            self._on_measured(event.key, event)

    def _hear(self, message: dict[str, object]) -> None:
        flight = self.flights.get(str(message.get("ticket")))
        if flight is None:
            return  # of another sweep, or late
        job = self.plan.jobs[flight.number]
        if message.get("event") == "begin":
            where = str(message.get("worker"))
            again = bool(flight.began) and flight.began != where
            flight.began = where
            if again:
                if self._gave_up(str(message["ticket"]), flight):
                    return
                self.reporter.note(f"cell {flight.number + 1} runs again: its worker was lost")
            self.reporter.begin(flight.number, job)
        elif message.get("event") == "progress":
            self.reporter.progress(flight.number, *progress_of(message))

    def _on_measured(self, key: str, event: Answered | Failed) -> None:
        flight = self.flights[key]
        if isinstance(event, Failed):
            self._lost(key, flight, event.reason)
            return
        answer = read(Measured, event.text) or Measured(worker=flight.began, refused="it answers nonsense")
        del self.flights[key]
        with flight.lock:
            if answer.lacking:
                self._send(flight, answer)
            elif answer.record is None or answer.refused:
                self.crew.refuse(answer.worker, answer.refused or "it gave no record")
                self._again(flight.number, answer.refused)
            elif fault := fault_of(answer.record, self.plan.jobs[flight.number].cell, flight.machine):
                self.crew.refuse(answer.worker, fault)
                self._again(flight.number, fault)
            else:
                self._record(flight, answer.record, answer.log)

    def _record(self, flight: _Flight, record: Record, log: str) -> None:
        number = flight.number
        if record.status == "timeout" and self.attempts[number] < self.patience.retries:
            self.attempts[number] += 1
            self.reporter.note(f"cell {number + 1} is {record.status}: {record.detail}; it is tried again")
            self.placement.give_back(number)
            return
        self._write(flight, record, log)

    def _write(self, flight: _Flight, record: Record, log: str) -> None:
        self._pace += (record.run.seconds - self._pace) / 4
        self._fill()  # the worker goes on while we write
        self.ledger.write(record, flight.machine, log)
        if not flight.began:
            self.reporter.begin(flight.number, self.plan.jobs[flight.number])
        self._finish(flight.number, record, reused=False)

    def _finish(self, number: int, record: Record, *, reused: bool) -> None:
        self.ledger.keep(number, record, reused=reused)
        self.placement.done(number)
        self.reporter.end(number, record, reused=reused)

    # -- losing -----------------------------------------------------------------------------------

    def _gave_up(self, key: str, flight: _Flight) -> bool:
        """Dask began the cell anew after its worker died; was it once too often?"""
        self.attempts[flight.number] += 1
        if self.attempts[flight.number] <= self.patience.retries:
            return False
        self._give_up(key, flight)
        return True

    def _lost(self, key: str, flight: _Flight, reason: str) -> None:
        """Nobody will answer: try again, or put down what happened."""
        self.cluster.cancel(key)
        if flight.began:
            self.attempts[flight.number] += 1
        if self.attempts[flight.number] > self.patience.retries:
            self._give_up(key, flight)
            return
        del self.flights[key]
        flight.lock.close()
        if flight.began:
            self.reporter.note(f"cell {flight.number + 1} runs again: {reason}")
        self.placement.give_back(flight.number)

    def _give_up(self, key: str, flight: _Flight) -> None:
        self.cluster.cancel(key)
        del self.flights[key]
        cell = self.plan.jobs[flight.number].cell
        tries = self.attempts[flight.number]
        detail = f"its worker was lost {tries} times while running it (last {flight.began or 'unknown'})"
        provenance = self.crew.provenance_of(flight.machine)
        with flight.lock:
            if provenance is None:  # nobody of that machine is left to speak for it
                self.crew.troubles.append(f"cell {flight.number + 1}: {detail}")
                self.placement.give_back(flight.number)
                return
            record = self.ledger.lost(cell, flight.machine, detail, provenance)
            self._write(flight, record, detail + "\n")

    def _again(self, number: int, why: str) -> None:
        """Its worker could not run it; another may, within bounds.

        Raises:
            EnvironmentProblem: too many workers failed on it.
        """
        self.attempts[number] += 1
        if self.attempts[number] > self.patience.retries:
            raise EnvironmentProblem(
                f"{self.attempts[number]} workers could not run cell {number + 1}, the last because {why}",
                "repair that and run the same command again",
            )
        self.placement.give_back(number)

    # -- sending files ----------------------------------------------------------------------------

    def _send(self, flight: _Flight, answer: Measured) -> None:
        """Send what a worker lacks; the cell waits for the last of it."""
        job = self.plan.jobs[flight.number]
        paths = {job.cell.model_sha256: job.model.path, job.cell.corpus_sha256: job.corpus.path}
        if job.cell.anchor_sha256:
            paths[job.cell.anchor_sha256] = Path(job.cell.anchor)
        if job.profile is not None and job.cell.profile is not None:
            paths[job.cell.profile.sha256] = job.profile
        if not self.transfers.send(flight.number, answer, paths):
            self.crew.refuse(answer.worker, "it asks for a file that is none of the cell's")
            self._again(flight.number, "it asked for another file")
