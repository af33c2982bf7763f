"""A Dask scheduler seen from a sweep: its workers, requests to them, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.scale import entry, guard
from turbo_eval.scale.wire import MACHINE, TOPIC

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
        return next((n.removeprefix(MACHINE) for n in self.resources if n.startswith(MACHINE)), "")


@dataclass(frozen=True)
class Answered:
    """The answer (JSON) to the request `key`."""

    key: str
    text: str


@dataclass(frozen=True)
class Failed:
    """The request `key` came to nothing: `reason`."""

    key: str
    reason: str


@dataclass(frozen=True)
class Said:
    """An event that a worker sent."""

    message: dict[str, object]


class Cluster:
    """A connection to a scheduler.

    Raises:
        EnvironmentProblem: nothing answers at `address`, or TLS refuses.
    """

    def __init__(self, address: str, security: Security | None = None, *, timeout: float = 10.0) -> None:
        from distributed import Client  # noqa: PLC0415 an extra that local sweeps do without

        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is said in our words
        guard.turn_on()
        self.address = address
        self._queue: queue.SimpleQueue[Future[Any] | Said] = queue.SimpleQueue()
        self._futures: dict[str, Future[Any]] = {}
        self._members: dict[str, Member] = {}
        self._ready: deque[Answered | Failed | Said] = deque()
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
            # Not scheduler_info(): that reads a cache which a timer fills without the workers.
            scheduler: Any = self._client.scheduler
            workers = self._client.sync(scheduler.identity, n_workers=-1).get("workers")
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
        if not self._ready:
            self._wait(timeout)
        return self._ready.popleft() if self._ready else None

    def _wait(self, timeout: float) -> None:
        """Fetch all that is there in one go: a round trip costs the same for many as for one."""
        items: list[Future[Any] | Said] = []
        with contextlib.suppress(queue.Empty):
            items.append(self._queue.get(timeout=timeout))
            while True:
                items.append(self._queue.get_nowait())
        self._require_scheduler()
        done: list[Future[Any]] = []
        for item in items:
            if isinstance(item, Said):
                self._ready.append(item)
            elif self._futures.get(str(item.key)) is item:  # not cancelled since
                done.append(item)
        good = [future for future in done if future.status == "finished"]
        answers = self._gather(good) if good else {}
        for future in done:
            key = str(future.key)
            if future.status == "finished" and key not in answers:
                # Its worker died with the answer, and Dask has it computed again.
                future.add_done_callback(self._queue.put)
                continue
            del self._futures[key]
            if key in answers:
                self._ready.append(Answered(key, answers[key]))
            else:
                error = future.exception(timeout=30) if future.status == "error" else None
                self._ready.append(_failed(key, error))

    def _gather(self, futures: list[Future[Any]]) -> dict[str, str]:
        """The answers that can be had within half a minute, by key."""
        keys = [str(future.key) for future in futures]
        coroutine = self._client.gather(futures, errors="skip", asynchronous=True)
        loop: Any = self._client.loop
        running = asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)
        try:
            texts = running.result(timeout=30)
        except TimeoutError:
            running.cancel()
            return {}
        if len(texts) != len(keys):  # one failed meanwhile, and it is not said which
            return {}
        return {key: str(text) for key, text in zip(keys, texts, strict=True)}

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


def _failed(key: str, error: BaseException | None) -> Failed:
    name = type(error).__name__ if error is not None else "cancelled"
    return Failed(key, f"{name}: {error}" if error is not None else name)
