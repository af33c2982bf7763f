"""A Dask scheduler seen from a sweep: its workers, requests to them, and what comes back."""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.scale import entry, guard
from turbo_eval.scale.wire import TOPIC

if TYPE_CHECKING:
    from distributed import Future
    from distributed.security import Security


@dataclass(frozen=True)
class Member:
    """A worker as the scheduler knows it."""

    address: str
    name: str
    resources: dict[str, float]

    def machine(self) -> str:
        """The machine class it declares; "" for a worker that is none of ours."""
        return next((n.removeprefix("machine:") for n in self.resources if n.startswith("machine:")), "")


@dataclass(frozen=True)
class Answered:
    """The answer (JSON) to the request `key`."""

    key: str
    text: str


@dataclass(frozen=True)
class Failed:
    """The request `key` came to nothing: `reason`. `lost`: because its workers died."""

    key: str
    reason: str
    lost: bool


@dataclass(frozen=True)
class Said:
    """An event that a worker sent."""

    message: dict[str, object]


class Cluster:
    """A connection to a scheduler.

    Raises:
        EnvironmentProblem: nothing answers at `address`, or TLS refuses.
    """

    def __init__(self, address: str, security: Security | None = None, *, timeout: float = 15.0) -> None:
        from distributed import Client

        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is said in our words
        guard.turn_on()
        self.address = address
        self._queue: queue.SimpleQueue[Future[Any] | Said] = queue.SimpleQueue()
        self._futures: dict[str, Future[Any]] = {}
        self._members: dict[str, Member] = {}
        try:
            self._client = Client(
                address, security=security, set_as_default=False, timeout=timeout, name="turbo-eval"
            )
            self._client.subscribe_topic(TOPIC, self._hear)
        except (OSError, TimeoutError, ValueError, RuntimeError) as error:
            guard.turn_off()
            raise EnvironmentProblem(
                f"no scheduler answers at {address} ({type(error).__name__})",
                "check that it runs, the address, and with tls:// the certificates",
            ) from None

    def _hear(self, event: tuple[float, Any]) -> None:
        if isinstance(event[1], dict):
            self._queue.put(Said(event[1]))

    def members(self) -> dict[str, Member]:
        """The workers that are there now, by address.

        Raises:
            EnvironmentProblem: the scheduler is gone.
        """
        self._require_scheduler()
        try:
            workers = self._client.scheduler_info(n_workers=-1).get("workers")
        except (OSError, TimeoutError, RuntimeError):
            workers = None
        if workers is None:  # the connection is down; Dask tries to get it back, and then says so
            self._require_scheduler()
            return self._members
        self._members = {
            str(address): Member(str(address), str(w.get("name")), dict(w.get("resources") or {}))
            for address, w in workers.items()
        }
        return self._members

    def _require_scheduler(self) -> None:
        if self._client.status not in ("running", "connecting"):
            raise EnvironmentProblem(
                f"the connection to the scheduler at {self.address} was lost",
                "finished cells are on record: run the same command again to go on",
            )

    def ask(
        self,
        key: str,
        request: str,
        workers: Sequence[str],
        *,
        body: bytes = b"",
        resources: dict[str, float] | None = None,
        priority: int = 0,
    ) -> None:
        """Send a request to whichever of `workers` the scheduler chooses; `key` names the answer.

        A request that runs already under this key, for a sweep that was cut off, is taken up.
        """
        future = self._client.submit(
            entry.call,
            request,
            body,
            key=key,
            workers=list(workers),
            resources=resources,
            priority=priority,
            pure=False,
        )
        self._futures[key] = future
        future.add_done_callback(self._queue.put)

    def cancel(self, key: str) -> None:
        """Take a request back; its answer will not come."""
        future = self._futures.pop(key, None)
        if future is not None:
            with contextlib.suppress(Exception):
                future.cancel()

    def next(self, timeout: float) -> Answered | Failed | Said | None:
        """The next thing that happened; None if nothing did within `timeout` seconds.

        Raises:
            EnvironmentProblem: the scheduler is gone.
        """
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            self._require_scheduler()
            return None
        if isinstance(item, Said):
            return item
        key = str(item.key)
        if self._futures.get(key) is not item:
            return None  # cancelled since
        if item.status == "finished":
            try:
                text = item.result(timeout=30)
            except TimeoutError:  # its worker died with the answer, and it is computed again
                item.add_done_callback(self._queue.put)
                return None
            except Exception as error:
                return self._failed(key, error)
            del self._futures[key]
            return Answered(key, str(text))
        self._require_scheduler()
        return self._failed(key, item.exception(timeout=30) if item.status == "error" else None)

    def _failed(self, key: str, error: BaseException | None) -> Failed:
        del self._futures[key]
        name = type(error).__name__ if error is not None else "cancelled"
        return Failed(key, f"{name}: {error}" if error is not None else name, lost=name == "KilledWorker")

    def close(self) -> None:
        """Let go of the scheduler and of every request."""
        for key in list(self._futures):
            self.cancel(key)
        with contextlib.suppress(Exception):
            self._client.close(timeout=5)
        guard.turn_off()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
