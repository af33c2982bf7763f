"""What may be unpickled and run in a process that talks Dask.

Dask's own protocol pickles task graphs and exceptions. Python raises the audit event
`pickle.find_class` for every class or function that any unpickler in the process looks up; a hook
that refuses all but a short list leaves a pickle nothing to call. The list: Dask's containers for a
graph, `entry.call`, plain built-in types, and exceptions with their tracebacks.

Dask also has operations that run or write what a peer sends (`run`, `upload_file`, plugins,
actors). They are taken out of the server.

What this does not do: it is no sandbox against code that runs already, and it does not say who may
connect. That is TLS's part.
"""

from __future__ import annotations

import builtins
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CONTAINERS = {
    ("dask._expr", "Expr._reconstruct"),
    ("dask._expr", "LLGExpr"),
    ("dask._task_spec", "Task"),
    ("turbo_eval.scale.entry", "call"),
    # what Dask's scheduler says of a task whose workers died
    ("distributed.scheduler", "KilledWorker"),
    ("distributed.scheduler", "NoValidWorkerError"),
    ("distributed.scheduler", "WorkerState"),
    ("distributed.core", "Status"),
    # exceptions come with their traceback, as data
    ("tblib", "Code"),
    ("tblib", "Frame"),
    ("tblib", "Traceback"),
    ("tblib.pickling_support", "unpickle_exception"),
    ("tblib.pickling_support", "unpickle_exception_with_attrs"),
    ("tblib.pickling_support", "unpickle_traceback"),
}
_PLAIN = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set"} | {
    "str",
    "tuple",
}
# Operations a worker answers. The rest runs code, writes files or has no use here.
_WORKER_OPS = {
    *("identity", "ping", "echo", "connection_stream", "stream-start", "terminate", "versions"),
    *("get_data", "free_keys", "keys", "call_stack", "profile", "profile_metadata"),
    *("get_logs", "get_monitor_info", "get_story"),
}
_SCHEDULER_REFUSES = {
    *("run_function", "broadcast", "proxy", "dump_cluster_state_to_url", "benchmark_hardware"),
    *("register_scheduler_plugin", "unregister_scheduler_plugin"),
    *("register_worker_plugin", "unregister_worker_plugin"),
    *("register_nanny_plugin", "unregister_nanny_plugin"),
}

_installed = False
_depth = 0  # of guards that are on, over all threads
_thread = threading.local()


def allowed(module: str, name: str) -> bool:
    """May a pickle refer to this?"""
    if (module, name) in _CONTAINERS:
        return True
    if module != "builtins":
        return False
    found = getattr(builtins, name, None)
    return name in _PLAIN or (isinstance(found, type) and issubclass(found, Exception))


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event != "pickle.find_class" or not _depth or getattr(_thread, "trusted", False):
        return
    module, name = str(args[0]), str(args[1])
    if not allowed(module, name):
        raise pickle.UnpicklingError(f"turbo-eval unpickles nothing of others, and this is {module}.{name}")


def turn_on() -> None:
    """From now on, for every thread."""
    global _installed, _depth
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _depth += 1


def turn_off() -> None:
    """Take back one `turn_on`."""
    global _depth
    _depth -= 1


@contextmanager
def trusted() -> Iterator[None]:
    """For this thread: libraries may unpickle their own files (data sets, caches)."""
    before = getattr(_thread, "trusted", False)
    _thread.trusted = True
    try:
        yield
    finally:
        _thread.trusted = before


def protect(server: Any) -> None:
    """Guard this process and take the operations that run code out of a Dask worker or scheduler."""
    turn_on()
    if hasattr(server, "plugin_add"):  # a worker
        server.handlers = {op: handler for op, handler in server.handlers.items() if op in _WORKER_OPS}
        server.plugin_add = _no_plugin
    else:
        for op in _SCHEDULER_REFUSES:
            server.handlers.pop(op, None)
    close_pages(server)


def close_pages(server: Any) -> None:
    """Stop Dask's web pages, which tell everyone who asks, in plain HTTP, what runs here."""
    pages = getattr(server, "http_server", None)
    if pages is not None:
        pages.stop()


async def _no_plugin(*_: Any, **__: Any) -> dict[str, str]:
    """The scheduler hands its plugins (pickles) to each new worker; they are left as they are."""
    return {"status": "OK"}
