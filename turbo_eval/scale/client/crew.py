"""The workers of a sweep: who is there, who may take cells, and why others may not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from turbo_eval.records.provenance import Provenance
from turbo_eval.scale.client.cluster import Answered, Cluster, Failed, Member
from turbo_eval.scale.wire import Admit, Admitted, Need, Source, read
from turbo_eval.sweep.run import Reporter
from turbo_eval.util.process import relevant_environment


@dataclass
class Worker:
    """A worker that was asked in. `state`: "asked", "welcome", or "refused"."""

    member: Member
    state: str = "asked"
    provenance: Provenance | None = None

    @property
    def machine(self) -> str:
        return self.member.machine()


class Crew:
    """The workers by address.

    Args:
        source: the build that all must measure with.
        needs: the files of the whole sweep.
        name: of this sweep, unlike any other's.
    """

    def __init__(
        self, cluster: Cluster, source: Source, needs: Iterable[Need], reporter: Reporter, name: str
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.troubles: list[str] = []
        self._cluster, self._source, self._reporter = cluster, source, reporter
        self._needs, self._prefix = tuple(needs), f"turbo-eval-admit-{name}-"

    def look(self) -> dict[str, Worker]:
        """Ask newcomers in; returns those who are gone."""
        members = {a: m for a, m in self._cluster.members().items() if m.resources.get(self._source.backend)}
        gone = {a: self.workers.pop(a) for a in [a for a in self.workers if a not in members]}
        for address, worker in gone.items():
            self._cluster.cancel(self._prefix + address)
            if worker.state == "welcome":
                self._reporter.note(f"worker {address} is gone")
        for address, member in members.items():
            if address not in self.workers:
                self.workers[address] = Worker(member)
                request = Admit(source=self._source, env=relevant_environment(), needs=self._needs)
                self._cluster.ask(self._prefix + address, request.model_dump_json(), [address], priority=10)
        return gone

    def asked_for(self, key: str) -> str | None:
        """The address that a task of this crew asked; None: it is none of its tasks."""
        return key.removeprefix(self._prefix) if key.startswith(self._prefix) else None

    def answered(self, address: str, event: Answered | Failed) -> None:
        """Take in what a worker said to being asked in."""
        worker = self.workers.get(address)
        if worker is None:
            return
        if isinstance(event, Failed):
            answer = Admitted(refused=f"it does not answer ({event.reason})")
        else:
            answer = read(Admitted, event.text) or Admitted(refused="its answer cannot be read")
        provenance = answer.provenance
        if not answer.refused and (provenance is None or provenance.tree != self._source.tree):
            answer = Admitted(refused="it does not say that it has the sweep's tree")
        elif provenance is not None and provenance.machine.id != worker.machine:
            answer = Admitted(refused="it is another machine than it declared")
        if answer.refused:
            self.refuse(address, answer.refused)
            return
        worker.state, worker.provenance = "welcome", provenance

    def refuse(self, address: str, why: str) -> None:
        """Give this worker no cells any more."""
        if address in self.workers:
            self.workers[address].state = "refused"
        sentence = f"worker {address} is refused: {why}"
        self.troubles.append(sentence)
        self._reporter.note(sentence)

    @property
    def undecided(self) -> bool:
        """Is an answer still to come?"""
        return any(worker.state == "asked" for worker in self.workers.values())

    def machines(self) -> set[str]:
        """Classes of machine that have a worker which works or may come to."""
        return {worker.machine for worker in self.workers.values() if worker.state != "refused"}

    def welcome(self) -> dict[str, list[str]]:
        """Addresses that take cells, by class of machine."""
        classes: dict[str, list[str]] = {}
        for address, worker in self.workers.items():
            if worker.state == "welcome":
                classes.setdefault(worker.machine, []).append(address)
        return classes

    def memory_gib(self, address: str) -> float:
        """Of a worker's device."""
        return self.workers[address].member.resources.get("memory_gib", 0.0)

    def provenance_of(self, machine: str) -> Provenance | None:
        """What a worker of this class said of itself."""
        known = (w.provenance for w in self.workers.values() if w.machine == machine)
        return next((p for p in known if p is not None), None)
