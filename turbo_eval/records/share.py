"""Records made fit for others: what is checked, and what is taken out, before they go into a pull request."""

from __future__ import annotations

import getpass
import json
import math
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from turbo_eval.records.record import Record
from turbo_eval.records.reference import References

# An absolute path, or one in a home folder: its last part may stay.
_PATH = re.compile(r"(?<![\w./-])(?:~|[A-Za-z]:)?/(?:[\w.+@%=-]+/)+([\w.+@%=-]*)")
_MOST_PPL = 1e5  # above it the model is destroyed, or the text is not one; shown, but not by a reference
_MOST_KLD = 60.0  # nats; a distribution of 2^17 tokens can hardly be further off


def scrub(record: Record) -> Record:
    """The record without folders of this machine: a path is cut down to its last part.

    The cell is left as it is, since its key depends on it.
    """
    data = record.model_dump(mode="json")
    return Record.model_validate({k: v if k == "cell" else _scrubbed(v) for k, v in data.items()})


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return _PATH.sub(r"\1", value)
    if isinstance(value, list):
        return [_scrubbed(item) for item in value]
    if isinstance(value, dict):
        return {key: _scrubbed(item) for key, item in value.items()}
    return value


def problems(records: Sequence[Record]) -> list[str]:
    """Why these records should not be shown to others, a sentence each; none: they may be."""
    references = References.among(records, None)
    found: list[str] = []
    for record in records:
        name = f"{record.cell.model} {record.cell.named()} {record.cell.metric} ({record.key})"
        found += [f"{name}: {why}" for why in (*_provenance(record), *_plausible(record), *_private(record))]
        if record.ok and record.cell.metric in ("ppl", "kld") and references.of(record) is None:
            found.append(f"{name}: its reference f16/f16 is not among the records")
    return found


def _provenance(record: Record) -> Iterator[str]:
    origin = record.provenance
    if origin.dirty:
        yield "its build had edited sources; build from a clean tree and measure again"
    for what, value in (("pin", origin.pin), ("compiler", origin.compiler), ("harness", origin.harness)):
        if not value:
            yield f"it does not say which {what} it is from"
    if not (origin.machine.cpu and origin.machine.cores):
        yield "it does not say which CPU it ran on"


def _plausible(record: Record) -> Iterator[str]:
    """What no working measurement gives."""
    if record.ppl is not None and record.ppl <= 1:
        yield f"a perplexity of {record.ppl:g} is no perplexity of a text"
    exact = record.cell.k == record.cell.v == "f16"
    if exact and record.ppl is not None and record.ppl > _MOST_PPL:
        yield f"a perplexity of {record.ppl:g} with f16/f16: the model does not work, or the text is none"
    if record.kld is not None:
        kld = record.kld
        if not -1e-4 <= kld.mean <= _MOST_KLD:
            yield f"a mean KL divergence of {kld.mean:g} cannot be"
        if not 0 <= kld.same_top_pct <= 100:
            yield f"{kld.same_top_pct:g} % cannot be a share of tokens"
    ppl, chunks = record.ppl, record.running_ppl
    if ppl is not None and chunks and not math.isclose(chunks[-1], ppl, rel_tol=1e-3):
        yield f"its last running perplexity {chunks[-1]:g} is not its perplexity {ppl:g}"


def _private(record: Record) -> Iterator[str]:
    """What names a machine, a user or a folder."""
    text = json.dumps(record.model_dump(mode="json"), ensure_ascii=False)
    for what, value in (("host name", socket.gethostname()), ("user name", getpass.getuser())):
        if len(value) > 3 and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE):
            yield f"this machine's {what} {value!r} is in it"
    path = _PATH.search(text.replace("\\/", "/"))
    if path is not None:
        yield f"the path {path[0]} is in it; measure with the model or text by a name or from its folder"
