"""A green light means that every check holds, on finite, fresh, matching records: for any records and bounds.

Files are changed as they lie on the disk, because nothing in this program can write a number that is not
finite. What ought to come out is worked out here from the raw files, without the code under test.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.golden import World, world
from tests.support.inside import call
from tests.support.records import make_kld, make_record
from turbo_eval.llama.provenance import machine
from turbo_eval.records.store import Store

PAIRS = ("f16:f16", "q8_0:q8_0", "q8_0:turbo3", "turbo4:turbo4", "turbo3:turbo3")
BAD = (math.nan, math.inf, -math.inf)


def mostly(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One in forty is rare: of sets of five records, most are sound."""
    return st.integers(0, 39).flatmap(lambda n: usual if n else rare)


PPL = mostly(st.floats(1.0, 50.0), st.one_of(st.sampled_from((*BAD, 0.0, -5.0)), st.floats()))
KLD = mostly(st.floats(0.0, 1.0), st.one_of(st.sampled_from(BAD), st.floats()))
BOUNDS = st.one_of(st.floats(0.0, 200.0), st.floats(0.0, 2.0), st.sampled_from((*BAD, -1.0, True, False)))
FAULTS = mostly(st.just(""), st.sampled_from(("stale", "foreign", "failed", "text", "missing", "wrong key")))


@dataclass(frozen=True)
class Entry:
    """A record file: its pair, its numbers, and what is wrong with it."""

    pair: str
    ppl: float
    kld: float
    fault: str  # "", "stale", "foreign", "failed", "text", "missing", "wrong key"


RECORDS = st.tuples(*(st.builds(Entry, st.just(pair), PPL, KLD, FAULTS) for pair in PAIRS))
GREEN: Counter[str] = Counter()  # how often a light was green: a property that never sees one says nothing


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world() as made:
        yield made


def lay_out(place: World, entries: tuple[Entry, ...]) -> Path:
    """The records as files, each with its fault."""
    root = place.folder / "any"
    shutil.rmtree(root, ignore_errors=True)
    store = Store(root, machine().id)
    (root / machine().id).mkdir(parents=True)
    for entry in entries:
        if entry.fault == "missing":
            continue
        cell: dict[str, Any] = place.shared()
        if entry.fault == "stale":
            cell |= {"tree": "b" * 40}
        if entry.fault == "text":
            cell |= {"corpus_sha256": "9" * 64}
        made = make_record(entry.pair, 10.0, kld=make_kld(0.01), **cell)
        data = made.model_dump(mode="json")
        data |= {"ppl": entry.ppl, "kld": data["kld"] | {"mean": entry.kld}}
        if entry.fault == "failed":
            data |= {"status": "crash", "ppl": None, "kld": None}
        if entry.fault == "foreign":
            data["provenance"]["machine"]["id"] = "other"
        if entry.fault == "wrong key":
            data["key"] = "0" * 16
        path = store.path(made.cell)
        path.write_text(json.dumps(data))
    return root


def sound(entry: Entry | None) -> bool:
    """Finite, fresh, of this machine and text: fit for a verdict."""
    return (
        entry is not None
        and entry.fault == ""
        and math.isfinite(entry.ppl)
        and entry.ppl > 0
        and math.isfinite(entry.kld)
    )


def holds(bound: float, value: float) -> bool:
    return not isinstance(bound, bool) and math.isfinite(bound) and value <= bound


def toml(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(float(value))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=RECORDS,
    name=st.sampled_from(("max_ppl", "max_delta_pct", "max_kld")),
    bound=BOUNDS,
    pattern=st.sampled_from(("*:*", "q8_0:*", "turbo4:turbo4")),
)
def test_a_gate_passes_only_what_holds(
    place: World, entries: tuple[Entry, ...], name: str, bound: float, pattern: str
) -> None:
    root = lay_out(place, entries)
    path = Path(place.gate("any", f"{name} = {toml(bound)}", PAIRS))
    text = path.read_text().replace("[sweep]", '[sweep]\nmetrics = ["kld"]')
    path.write_text(text.replace('"q8_0:*"', f'"{pattern}"'))
    code, _out, err = call("gate", path, "--bin-dir", place.bin, "--results", root)
    assert "Traceback" not in err
    if code != 0:
        assert code in (1, 2, 3)
        return
    GREEN["gate"] += 1
    by_pair = {entry.pair: entry for entry in entries}
    assert all(sound(by_pair.get(pair)) for pair in PAIRS), "a cell of the gate is missing or unsound"
    matching = [
        p for p in PAIRS if pattern == "*:*" or p == pattern or (pattern == "q8_0:*" and p[:4] == "q8_0")
    ]
    base = by_pair["f16:f16"].ppl
    for pair in matching:
        entry = by_pair[pair]
        value = {"max_ppl": entry.ppl, "max_kld": entry.kld, "max_delta_pct": 100 * (entry.ppl / base - 1)}[
            name
        ]
        assert holds(bound, value), (pair, name, value, bound)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=RECORDS, option=st.sampled_from(("--max-delta-ppl", "--max-kld")), bound=BOUNDS)
def test_only_what_is_within_the_bound_is_recommended(
    place: World, entries: tuple[Entry, ...], option: str, bound: float
) -> None:
    root = lay_out(place, entries)
    args = ["recommend", str(place.model), f"{option}={toml(bound)}", "--no-measure", "--json"]
    code, out, err = call(*args, "--bin-dir", place.bin, "--results", root)
    assert "Traceback" not in err
    if code != 0:
        assert code in (1, 2, 3)
        assert not out or json.loads(out)["recommended"] is None
        return
    GREEN["recommend"] += 1
    named = json.loads(out)["recommended"]
    by_pair = {entry.pair: entry for entry in entries}
    entry, base = by_pair.get(f"{named['k']}:{named['v']}"), by_pair.get("f16:f16")
    # a record of another text may speak for its pair too, with the reference of that text
    assert entry is not None and entry.fault in ("", "text")
    assert math.isfinite(entry.ppl) and entry.ppl > 0 and math.isfinite(entry.kld)
    if option == "--max-kld":
        assert holds(bound, entry.kld)
        return
    assert base is not None and base.fault == entry.fault and math.isfinite(base.ppl) and base.ppl > 0
    delta = 100 * (entry.ppl / base.ppl - 1)
    assert holds(bound, delta) and named["delta_pct"] == pytest.approx(delta)
    assert named["against"] == "f16/f16"


def test_the_properties_saw_green_lights() -> None:
    assert GREEN["gate"] >= 10 and GREEN["recommend"] >= 10, GREEN


@pytest.mark.parametrize("bound", [*BAD, True, -1.0])
def test_the_bounds_that_opened_it(place: World, bound: float) -> None:
    """The finding itself: a gate that lets +22 % pass."""
    root = lay_out(
        place, tuple(Entry(p, x, 0.01, "") for p, x in zip(PAIRS, (10, 10, 10, 12.2, 12.2), strict=True))
    )
    path = Path(place.gate("any", f"max_delta_pct = {toml(bound)}", PAIRS))
    path.write_text(
        path.read_text().replace('"q8_0:*"', '"turbo*"').replace("[sweep]", '[sweep]\nmetrics = ["kld"]')
    )
    code, out, _ = call("gate", path, "--bin-dir", place.bin, "--results", root)
    assert code == (1 if bound == -1.0 else 2) and "pass" not in out
