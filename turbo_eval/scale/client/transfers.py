"""Files on their way to workers that lack them, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from turbo_eval.scale.client.cluster import Answered, Cluster, Failed
from turbo_eval.scale.client.crew import Crew
from turbo_eval.scale.wire import CHUNK, Measured, Need, Put, Stored, read
from turbo_eval.sweep.run import Reporter


@dataclass
class _Transfer:
    """A file on its way to a worker; `held`: cells that wait for it."""

    need: Need
    path: Path
    worker: str
    offset: int = 0
    restarts: int = 0
    held: list[int] = field(default_factory=list)


class Transfers:
    """All that are under way.

    Args:
        release: called with the number of a cell that waits no more.
        retries: how often a file may start again.
    """

    def __init__(
        self,
        cluster: Cluster,
        crew: Crew,
        reporter: Reporter,
        name: str,
        release: Callable[[int], None],
        retries: int,
    ) -> None:
        self._cluster, self._crew, self._reporter = cluster, crew, reporter
        self._release_cell, self._retries = release, retries
        self._name, self._sent = name, 0
        self._under_way: dict[str, _Transfer] = {}

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def __contains__(self, key: str) -> bool:
        return key in self._under_way

    def send(self, number: int, answer: Measured, paths: dict[str, Path]) -> bool:
        """Send what a worker lacks for a cell, which waits for the last of it.

        Returns:
            False: it asks for a file that is none of the cell's.
        """
        last: _Transfer | None = None
        for need in answer.lacking:
            if need.sha256 not in paths:
                return False
            same = (t for t in self._under_way.values() if (t.worker, t.need) == (answer.worker, need))
            last = next(same, None)
            if last is None:
                last = _Transfer(need, paths[need.sha256], answer.worker)
                self._reporter.note(
                    f"sending {need.kind} {need.name} ({need.size / 2**20:.0f} MiB) to {answer.worker}"
                )
                self._next_piece(last)
        if last is not None:
            last.held.append(number)
        return True

    def drop(self, worker: str) -> None:
        """The worker is gone, and with it what was on its way there."""
        for key in [k for k, t in self._under_way.items() if t.worker == worker]:
            self._release(self._under_way.pop(key))
            self._cluster.cancel(key)

    def _next_piece(self, transfer: _Transfer) -> None:
        self._sent += 1
        key = f"turbo-eval-put-{self._name}-{self._sent}"
        with transfer.path.open("rb") as file:
            file.seek(transfer.offset)
            body = file.read(CHUNK)
        request = Put(need=transfer.need, offset=transfer.offset)
        self._under_way[key] = transfer
        self._cluster.ask(key, request.model_dump_json(), [transfer.worker], body=body, priority=10)

    def answered(self, key: str, event: Answered | Failed) -> None:
        """A piece arrived, or did not."""
        transfer = self._under_way.pop(key)
        answer = read(Stored, event.text) if isinstance(event, Answered) else None
        if answer is None or answer.refused:
            why = answer.refused if answer else getattr(event, "reason", "its answer cannot be read")
            self._crew.refuse(transfer.worker, f"{transfer.need.name} could not be sent to it: {why}")
            self._release(transfer)
        elif answer.size >= transfer.need.size:
            self._release(transfer)
        else:
            if answer.size <= transfer.offset:
                transfer.restarts += 1
            if transfer.restarts > self._retries:
                self._crew.refuse(transfer.worker, f"{transfer.need.name} does not arrive there")
                self._release(transfer)
                return
            transfer.offset = answer.size
            self._next_piece(transfer)

    def _release(self, transfer: _Transfer) -> None:
        for number in transfer.held:
            self._release_cell(number)
