"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """`ok` None: not for this device, which is no fault of ours (a pair of upstream's own types)."""

    ok: bool | None
    detail: str
