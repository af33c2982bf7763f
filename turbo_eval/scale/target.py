"""Where a sweep's cells run: here one by one, here on N devices, or on somebody's scheduler."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from turbo_eval.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from distributed.security import Security

_EXAMPLES = "write local, local:2, tcp://host:8786, tls://host:8786, or the file `dask scheduler` wrote"


@dataclass(frozen=True)
class Target:
    """`local`: one cell at a time in this process; `pool`: `jobs` workers here; `remote`: `address`."""

    kind: Literal["local", "pool", "remote"]
    jobs: int = 1
    address: str = ""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the authority that signed every party's certificate, and our own pair."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def given(self) -> bool:
        return any((self.ca, self.cert, self.key))


def parse_target(scheduler: str | None, jobs: int | None) -> Target:
    """`--scheduler` and `--jobs`; `--jobs N` is `--scheduler local:N`.

    Raises:
        UsageError: both, neither a known form, or no positive number.
    """
    if scheduler is not None and jobs is not None:
        raise UsageError("--jobs and --scheduler say the same thing", f"`--jobs {jobs}` is local:{jobs}")
    if jobs is not None:
        return _pool(jobs, f"--jobs {jobs}")
    if scheduler is None or scheduler == "local":
        return Target("local")
    if pool := re.fullmatch(r"local:(\d+)", scheduler):
        return _pool(int(pool[1]), f"--scheduler {scheduler}")
    return Target("remote", address=scheduler_address(scheduler))


def _pool(jobs: int, said: str) -> Target:
    if jobs < 1:
        raise UsageError(f"{said} is no number of cells at a time", "give 1 or more")
    return Target("local") if jobs == 1 else Target("pool", jobs=jobs)


def scheduler_address(text: str) -> str:
    """The address in `text`, or in the JSON file that it names.

    Raises:
        UsageError: neither.
    """
    if re.fullmatch(r"(tcp|tls)://\S+:\d+", text):
        return text
    path = Path(text).expanduser()
    if path.suffix == ".json" or path.is_file():
        try:
            address = str(json.loads(path.read_text())["address"])
        except FileNotFoundError:
            raise UsageError(f"there is no scheduler file {path}", "start the scheduler first") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path} is no scheduler file", "name the one of `dask scheduler --scheduler-file`"
            ) from None
        return scheduler_address(address) if not address.endswith(".json") else address
    raise UsageError(f"{text!r} is no scheduler", _EXAMPLES)


def host_of(address: str) -> str:
    """The host in protocol://host:port."""
    return address.split("://", 1)[-1].rsplit(":", 1)[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Is it an address that only this machine reaches?"""
    host = host_of(address)
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d+){3}", host))


def security(address: str, tls: TlsFiles, *, insecure: bool) -> Security | None:
    """What the connection to `address` is secured by; None: nothing, which was agreed to.

    Files that are not given come from Dask's configuration (distributed.comm.tls), if they are there.

    Raises:
        UsageError: plain TCP to another machine without `insecure`; TLS without its files.
    """
    if address.startswith("tcp://"):
        if tls.given():
            raise UsageError(f"{address} is not encrypted and takes no certificates", "write tls://")
        if not insecure and not is_loopback(address):
            raise UsageError(
                f"{address} is another machine and not encrypted: anyone on the way can read and alter cells",
                "use tls:// with --tls-ca, --tls-cert, --tls-key, or --insecure on a network of your own",
            )
        return None
    from distributed.security import Security  # noqa: PLC0415 an extra that local sweeps do without

    chosen: dict[str, Any] = {}
    for role in ("client", "worker"):
        chosen |= {f"tls_{role}_cert": tls.cert, f"tls_{role}_key": tls.key}
    chosen["tls_ca_file"] = tls.ca
    given = {name: str(path) for name, path in chosen.items() if path is not None}
    for path in given.values():
        if not Path(path).is_file():
            raise UsageError(f"there is no certificate or key {path}")
    made: Any = Security(require_encryption=True, **given)
    if not (made.tls_ca_file and made.tls_client_cert):
        raise UsageError(
            f"{address} needs certificates",
            "give --tls-ca, --tls-cert and --tls-key (docs/how-to/scale-out.md)",
        )
    try:
        made.get_connection_args("client")
    except OSError as error:
        raise EnvironmentProblem(
            f"the certificates for {address} cannot be used ({error})", "check that they are PEM files"
        ) from None
    return cast("Security", made)
