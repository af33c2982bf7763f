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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from turbo_eval.errors import EnvironmentProblem, IncompleteError
from turbo_eval.records.provenance import Provenance
from turbo_eval.records.record import Record, Run
from turbo_eval.records.store import Store
from turbo_eval.scale.cluster import Answered, Cluster, Failed, Member, Said
from turbo_eval.scale.placement import Group, Placement
from turbo_eval.scale.wire import CHUNK, Admit, Admitted, Measure, Measured, Need, Put, Source, Stored
from turbo_eval.sweep.plan import Job, Plan, references
from turbo_eval.sweep.run import InterruptedSweepError, Reporter, SweepResult
from turbo_eval.util.process import relevant_environment

# Cells a worker is given at a time. One, so that none waits at a busy worker while another is idle; if
# they are so short that fetching the next would be felt, some more. Bounded in any case, and with it
# what client and scheduler hold.
IN_FLIGHT = 3
SHORT = 2.0  # seconds
_LOOK = 1.0  # seconds between looks at who is there


@dataclass
class _Worker:
    """A worker that was asked in. `state`: "asked", "welcome", or "refused"."""

    member: Member
    state: str = "asked"
    provenance: Provenance | None = None


@dataclass
class _Flight:
    """A cell that was asked for. `began`: where its worker said that it started."""

    number: int
    machine: str
    workers: tuple[str, ...]
    lock: ExitStack
    began: str = ""


@dataclass
class _Transfer:
    """A file on its way to a worker; `held`: cells that wait for it."""

    need: Need
    path: Path
    worker: str
    offset: int = 0
    restarts: int = 0
    held: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for a worker that can take what is left, and how often a cell is tried again."""

    seconds: float = 60.0
    retries: int = 2


def needs_of(job: Job) -> tuple[Need, ...]:
    """The files of a job."""
    cell = job.cell
    needs = [
        Need(kind="model", name=cell.model, sha256=cell.model_sha256, size=job.model.size),
        Need(kind="corpus", name=cell.corpus, sha256=cell.corpus_sha256, size=job.corpus.size),
    ]
    if cell.anchor_sha256:
        path = Path(cell.anchor)
        needs.append(Need(kind="anchor", name=path.name, sha256=cell.anchor_sha256, size=path.stat().st_size))
    return tuple(needs)


def memory_gib(job: Job) -> float:
    """Least device memory of a cell: weights and KV cache (compute buffers come on top)."""
    info, cell = job.model.gguf, job.cell
    tokens = max([cell.ctx, *cell.options.get("lengths", ())])
    values = tokens * info.n_layer * info.n_head_kv * (info.head_dim_k + info.head_dim_v)
    return float(job.model.size + 2 * values) / 2**30


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
        self.results, self.fresh, self.patience = results, fresh, patience
        build = plan.build
        self.source = Source(
            backend=plan.spec.backend,
            tree=build.tree,
            pin=build.pin,
            series=provenance.series,
            dirty=build.dirty,
        )
        self.own_machine = provenance.machine.id
        same: dict[tuple[Need, ...], tuple[Need, ...]] = {}  # one tuple a combination of files
        self.needs = [same.setdefault(needs, needs) for needs in map(needs_of, plan.jobs)]
        self.placement = Placement(plan.cells(), [memory_gib(job) for job in plan.jobs])
        self.records: dict[int, Record] = {}
        self.reused = 0
        self.partly: dict[str, set[str]] = {}  # comparisons: machines that have a part on record
        self.told: set[str] = set()
        self.workers: dict[str, _Worker] = {}
        self.flights: dict[str, _Flight] = {}
        self.transfers: dict[str, _Transfer] = {}
        self.attempts: Counter[int] = Counter()
        self.asked: Counter[int] = Counter()
        self.deferred: dict[int, float] = {}  # cells that another sweep runs: when to look again
        self.waited: set[int] = set()  # for such cells
        self.troubles: list[str] = []
        self._stores: dict[str, Store] = {}
        self._provenances: dict[str, Provenance] = {}
        self._pace = SHORT  # seconds of the last cells, roughly
        self._looked = 0.0
        self._useful = time.monotonic()  # when a worker was last there for what is left
        self._id = uuid4().hex
        self._sent = 0

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
                f"interrupted; {len(self.records)} of {len(self.plan.jobs)} cells are on record",
                "run the same command again to go on",
            ) from None
        finally:
            for key, flight in self.flights.items():
                self.cluster.cancel(key)
                flight.lock.close()
        return SweepResult([self.records[n] for n in sorted(self.records)], self.reused)

    # -- what is on record ------------------------------------------------------------------------

    def store(self, machine: str) -> Store:
        if machine not in self._stores:
            self._stores[machine] = Store(self.results, machine)
        return self._stores[machine]

    def _recall(self) -> None:
        """Comparisons that one machine has whole are done; the others remember who has a part."""
        if self.fresh or not self.results.is_dir():
            return
        folders = sorted(
            (p.name for p in self.results.iterdir() if p.is_dir()), key=lambda n: (n != self.own_machine, n)
        )
        for group in self.placement.groups.values():
            for machine in folders:
                found = {n: self.store(machine).load(self.plan.jobs[n].cell) for n in group.numbers}
                good = {n: record for n, record in found.items() if record is not None and record.ok}
                if len(good) == len(group.numbers):
                    group.pending.clear()
                    for number, record in good.items():
                        self._finish(number, record, reused=True)
                    break
                if good:
                    self.partly.setdefault(group.name, set()).add(machine)

    def _may(self, group: Group, machine: str) -> bool:
        """Where a part is on record, only that class may go on, as long as it has a worker here."""
        has_part = self.partly.get(group.name, set())
        here = {worker.member.machine() for worker in self.workers.values() if worker.state != "refused"}
        return machine in has_part or not (has_part & here)

    # -- who is there -----------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        members = {a: m for a, m in self.cluster.members().items() if m.resources.get(self.source.backend)}
        for address in [a for a in self.workers if a not in members]:
            self._gone(address)
        for address, member in members.items():
            if address not in self.workers:
                self.workers[address] = _Worker(member)
                needs = {need.sha256: need for some in self.needs for need in some}
                request = Admit(source=self.source, env=relevant_environment(), needs=tuple(needs.values()))
                self.cluster.ask(self._admission(address), request.model_dump_json(), [address], priority=10)
        for key, flight in list(self.flights.items()):
            if not any(address in self.workers for address in flight.workers):
                self._lost(key, flight, "every worker that it was given to is gone")
        self._be_patient(now)

    def _admission(self, address: str) -> str:
        return f"turbo-eval-admit-{self._id}-{address}"

    def _gone(self, address: str) -> None:
        worker = self.workers.pop(address)
        self.cluster.cancel(self._admission(address))
        for key in [k for k, t in self.transfers.items() if t.worker == address]:
            self._release(self.transfers.pop(key))
            self.cluster.cancel(key)
        if worker.state == "welcome":
            self.reporter.note(f"worker {address} is gone")
        machine = worker.member.machine()
        if not any(w.member.machine() == machine and w.state != "refused" for w in self.workers.values()):
            self.placement.release(machine)

    def _be_patient(self, now: float) -> None:
        """Someone must be there who works or may come to."""
        asked = any(worker.state == "asked" for worker in self.workers.values())
        if self.flights or self.transfers or self.deferred or asked:
            self._useful = now
        elif now - self._useful > self.patience.seconds:
            reasons = list(dict.fromkeys(self.troubles))
            why = "; ".join(reasons[-3:]) if reasons else self._who_is_there()
            raise IncompleteError(
                f"no worker can take the {self.placement.left} cells that are left: {why}",
                "repair or add one and run the same command again",
            )

    def _who_is_there(self) -> str:
        welcome = {w.member.machine(): w.member for w in self.workers.values() if w.state == "welcome"}
        if not welcome:
            return f"{self.cluster.address} has no worker for {self.source.backend}"
        waiting = [g for g in self.placement.groups.values() if g.pending]
        most = max((m.resources.get("memory_gib", 0.0) for m in welcome.values()), default=0.0)
        large = [g for g in waiting if g.memory_gib > most]
        if large:
            return f"they need {large[0].memory_gib:.1f} GiB of device memory, the largest has {most:.1f}"
        classes = {g.machine for g in waiting if g.machine}
        return f"their comparison was begun on {', '.join(sorted(classes))}, which has no worker now"

    # -- asking -----------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Keep every welcome worker supplied."""
        classes: dict[str, list[str]] = {}
        for address, worker in self.workers.items():
            if worker.state == "welcome":
                classes.setdefault(worker.member.machine(), []).append(address)
        self._look_again()
        depth = IN_FLIGHT if self._pace < SHORT else 1
        for machine, addresses in classes.items():
            memory = self.workers[addresses[0]].member.resources.get("memory_gib", 0.0)
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
        has_part = self.partly.get(group, set())
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
        job, store = self.plan.jobs[number], self.store(machine)
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
        request = Measure(
            ticket="",
            cell=job.cell,
            source=self.source,
            needs=self.needs[number],
            anchor=_anchor(job),
            threads=self.plan.spec.threads,
            timeout=self.plan.spec.timeout,
            references=tuple(self._references(job, store)),
        )
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

    def _references(self, job: Job, store: Store) -> list[Record]:
        found = (store.load(reference) for reference in references(job.cell))
        return [record for record in found if record is not None and record.ok]

    # -- hearing ----------------------------------------------------------------------------------

    def _handle(self, event: Answered | Failed | Said) -> None:
        if isinstance(event, Said):
            self._hear(event.message)
        elif event.key.startswith(self._admission("")):
            self._on_admitted(event.key.removeprefix(self._admission("")), event)
        elif event.key in self.transfers:
            self._on_stored(event.key, event)
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
            self.reporter.progress(flight.number, *_progress(message))

    def _on_admitted(self, address: str, event: Answered | Failed) -> None:
        worker = self.workers.get(address)
        if worker is None:
            return
        if isinstance(event, Failed):
            answer = Admitted(refused=f"it does not answer ({event.reason})")
        else:
            answer = _read(Admitted, event.text) or Admitted(refused="its answer cannot be read")
        provenance = answer.provenance
        if not answer.refused and (provenance is None or provenance.tree != self.source.tree):
            answer = Admitted(refused="it does not say that it has the sweep's tree")
        elif provenance is not None and provenance.machine.id != worker.member.machine():
            answer = Admitted(refused="it is another machine than it declared")
        if answer.refused:
            self._refuse(address, answer.refused)
            return
        worker.state, worker.provenance = "welcome", provenance

    def _refuse(self, address: str, why: str) -> None:
        """Give this worker no cells any more."""
        if address in self.workers:
            self.workers[address].state = "refused"
        sentence = f"worker {address} is refused: {why}"
        self.troubles.append(sentence)
        self.reporter.note(sentence)

    def _on_measured(self, key: str, event: Answered | Failed) -> None:
        flight = self.flights[key]
        if isinstance(event, Failed):
            self._lost(key, flight, event.reason)
            return
        answer = _read(Measured, event.text) or Measured(worker=flight.began, refused="it answers nonsense")
        del self.flights[key]
        with flight.lock:
            if answer.lacking:
                self._send(flight, answer)
            elif answer.record is None or answer.refused:
                self._refuse(answer.worker, answer.refused or "it gave no record")
                self._again(flight.number, answer.refused)
            elif fault := self._fault(answer.record, flight):
                self._refuse(answer.worker, fault)
                self._again(flight.number, fault)
            else:
                self._record(flight, answer.record, answer.log)

    def _fault(self, record: Record, flight: _Flight) -> str | None:
        """What makes a record none of what was asked for."""
        job = self.plan.jobs[flight.number]
        if record.cell != job.cell or record.key != job.cell.key():
            return "its record is of another cell"
        if record.machine != flight.machine:
            return f"its record is of machine {record.machine}, the comparison is on {flight.machine}"
        if record.provenance.tree != self.source.tree:
            return f"its record is of tree {record.provenance.tree[:12]}"
        return None

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
        store = self.store(flight.machine)
        place = store.log_path(record.cell)
        place.write_text(log, encoding="utf-8")  # in place: the lock is on this file
        store.write(record)
        if not flight.began:
            self.reporter.begin(flight.number, self.plan.jobs[flight.number])
        self._finish(flight.number, record, reused=False)

    def _finish(self, number: int, record: Record, *, reused: bool) -> None:
        self.records[number] = self._lean(number, record)
        self.reused += reused
        self.placement.done(number)
        self.reporter.end(number, record, reused=reused)

    def _lean(self, number: int, record: Record) -> Record:
        """The record, holding the plan's cell and one provenance with its like: a third of the memory."""
        known = self._provenances.setdefault(record.machine, record.provenance)
        cell = self.plan.jobs[number].cell
        shared = {"cell": cell} if record.cell == cell else {}
        return record.model_copy(
            update=shared | ({"provenance": known} if record.provenance == known else {})
        )

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
        store = self.store(flight.machine)
        tries = self.attempts[flight.number]
        detail = f"its worker was lost {tries} times while running it (last {flight.began or 'unknown'})"
        known = [w.provenance for w in self.workers.values() if w.member.machine() == flight.machine]
        provenance = next((p for p in known if p is not None), None)
        with flight.lock:
            if provenance is None:  # nobody of that machine is left to speak for it
                self.troubles.append(f"cell {flight.number + 1}: {detail}")
                self.placement.give_back(flight.number)
                return
            run = Run(
                argv=(),
                env=relevant_environment(),
                env_removed=(),
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=0.0,
                cpu_seconds=0.0,
                peak_mib=0.0,
                returncode=None,
                threads=0,
                log=str(store.log_path(cell).relative_to(store.root)),
            )
            record = Record(
                key=cell.key(), cell=cell, status="crash", detail=detail, run=run, provenance=provenance
            )
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
        last: _Transfer | None = None
        for need in answer.lacking:
            if need.sha256 not in paths:
                self._refuse(answer.worker, "it asks for a file that is none of the cell's")
                self._again(flight.number, "it asked for another file")
                return
            same = (t for t in self.transfers.values() if (t.worker, t.need) == (answer.worker, need))
            last = next(same, None)
            if last is None:
                last = _Transfer(need, paths[need.sha256], answer.worker)
                self.reporter.note(
                    f"sending {need.kind} {need.name} ({need.size / 2**20:.0f} MiB) to {answer.worker}"
                )
                self._next_piece(last)
        if last is not None:
            last.held.append(flight.number)

    def _next_piece(self, transfer: _Transfer) -> None:
        self._sent += 1
        key = f"turbo-eval-put-{self._id}-{self._sent}"
        with transfer.path.open("rb") as file:
            file.seek(transfer.offset)
            body = file.read(CHUNK)
        request = Put(need=transfer.need, offset=transfer.offset)
        self.transfers[key] = transfer
        self.cluster.ask(key, request.model_dump_json(), [transfer.worker], body=body, priority=10)

    def _on_stored(self, key: str, event: Answered | Failed) -> None:
        transfer = self.transfers.pop(key)
        answer = _read(Stored, event.text) if isinstance(event, Answered) else None
        if answer is None or answer.refused:
            why = answer.refused if answer else getattr(event, "reason", "its answer cannot be read")
            self._refuse(transfer.worker, f"{transfer.need.name} could not be sent to it: {why}")
            self._release(transfer)
        elif answer.size >= transfer.need.size:
            self._release(transfer)
        else:
            if answer.size <= transfer.offset:
                transfer.restarts += 1
            if transfer.restarts > self.patience.retries:
                self._refuse(transfer.worker, f"{transfer.need.name} does not arrive there")
                self._release(transfer)
                return
            transfer.offset = answer.size
            self._next_piece(transfer)

    def _release(self, transfer: _Transfer) -> None:
        for number in transfer.held:
            self.placement.give_back(number)


def _anchor(job: Job) -> Literal["auto", "on", "off", "file"] | None:
    """What --kv-anchor gets; a file goes by content, its path here means nothing there."""
    if job.anchor is None:
        return None
    modes: dict[str, Literal["auto", "on", "off"]] = {"auto": "auto", "on": "on", "off": "off"}
    return modes.get(job.anchor, "file")


_M = TypeVar("_M", bound=BaseModel)


def _progress(message: dict[str, object]) -> tuple[int, int | None, float | None]:
    """Chunks done, chunks in all, running perplexity; what a worker says is not believed blindly."""
    chunk, total, ppl = (message.get(name) for name in ("chunk", "total", "ppl"))
    return (
        chunk if isinstance(chunk, int) else 0,
        total if isinstance(total, int) else None,
        ppl if isinstance(ppl, float) else None,
    )


def _read(model: type[_M], text: str) -> _M | None:
    """The message in `text`; None if it is none."""
    try:
        return model.model_validate_json(text)
    except ValidationError:
        return None
