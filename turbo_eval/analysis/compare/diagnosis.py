"""Which cells differ, and what recorded difference can be behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial

from turbo_eval.analysis.compare.difference import Difference
from turbo_eval.analysis.compare.match import Entry, facts
from turbo_eval.formats.cache_types import CACHE_TYPES

_ASKED = frozenset({"K type", "V type"})
UNQUANTIZED = frozenset({"f32", "f16", "bf16"})

# Provenance as it is shown, in the order of how much it may explain.
_PROVENANCE: dict[str, Callable[[Entry], str]] = {
    "K type": lambda r: facts(r)["k"],
    "V type": lambda r: facts(r)["v"],
    "backend": lambda r: facts(r)["backend"],
    "K anchor": lambda r: (r.effective.anchor or "off").replace("off (K is not quantized)", "off"),
    "environment": lambda r: " ".join(f"{n}={x}" for n, x in json.loads(facts(r)["env"]).items()) or "none",
    "ubatch": lambda r: facts(r).get("ubatch", ""),
    "patched tree": lambda r: facts(r)["tree"][:16] + (" (dirty)" if r.provenance.dirty else ""),
    "upstream pin": lambda r: r.provenance.pin[:12],
    "patch series": lambda r: r.provenance.series[:12] or "none",
    "GPU": lambda r: r.provenance.machine.gpu or "none",
    "CPU": lambda r: r.provenance.machine.cpu,
    "CPU features": lambda r: " ".join(r.provenance.machine.features),
    "operating system": lambda r: r.provenance.machine.os,
    "compiler": lambda r: r.provenance.compiler,
    "build options": lambda r: " ".join(r.provenance.flags) or "not recorded",
    "threads": lambda r: facts(r)["threads"],
    "turbo-eval": lambda r: r.provenance.harness,
}


def provenance_differences(pairs: Sequence[tuple[Entry, Entry]]) -> tuple[tuple[str, str, str], ...]:
    """(what, on side A, on side B) of everything recorded that isn't the same."""
    rows: list[tuple[str, str, str]] = []
    for what, read in _PROVENANCE.items():
        if all(read(x) == read(y) for x, y in pairs):
            continue
        a, b = (" | ".join(dict.fromkeys(read(pair[n]) for pair in pairs)) for n in (0, 1))
        rows.append((what, a, b))
    return tuple(rows)


def diagnose(
    differing: Sequence[Difference],
    agreeing: Sequence[Difference],
    provenance: Sequence[tuple[str, str, str]],
) -> str:
    """One or two sentences: the pattern, and the recorded difference that explains it or doesn't."""
    changed = {what: (a, b) for what, a, b in provenance}
    slower = [d for d in differing if d.is_speed]
    if slower:
        differing, agreeing = ([d for d in side if not d.is_speed] for side in (differing, agreeing))
        first = f"{slower[0].what} of {slower[0].pair} at {slower[0].ctx}"
        more = f" and {len(slower) - 1} more" if len(slower) > 1 else ""
        speed = f"Speed differs: {first}{more}. "
        quality = "" if not differing and not agreeing else diagnose(differing, agreeing, provenance)
        return (speed + quality).rstrip()
    agreeing = [d for d in agreeing if not d.is_speed] or agreeing
    if not differing:
        spread = f", although {_listed(list(changed))} differ" if changed else ""
        return f"No cell differs beyond noise{spread}."
    asked = [f"{what.split()[0]} {a} against {b}" for what, (a, b) in changed.items() if what in _ASKED]
    if asked:
        return f"The sides ask for different caches ({', '.join(asked)}): that explains it."
    where, kind = _pattern(differing, agreeing)
    return f"{where} {_cause(changed, kind)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _quantized(name: str) -> bool:
    return name in CACHE_TYPES and name not in UNQUANTIZED


def _turbo(name: str) -> bool:
    return name.startswith("turbo")


def _on_k(member: Callable[[str], bool], k: str, v: str) -> bool:
    return member(k)


def _on_v(member: Callable[[str], bool], k: str, v: str) -> bool:
    return member(v)


def _on_either(member: Callable[[str], bool], k: str, v: str) -> bool:
    return member(k) or member(v)


def _readings(types: set[str]) -> dict[str, Callable[[str, str], bool]]:
    """Ways to say which pairs differ, from the narrowest to the widest."""
    single = [(t, t.__eq__) for t in sorted(types)]
    families = [("turbo types", _turbo), ("quantized types", _quantized)]
    sides = (("on K", _on_k), ("on V", _on_v), ("on either side", _on_either))
    return {
        f"{name} {side}": partial(holds, member)
        for members in (single, families)
        for side, holds in sides
        for name, member in members
    }


def _pattern(differing: Sequence[Difference], agreeing: Sequence[Difference]) -> tuple[str, str]:
    """(a sentence on which cells differ, their common trait: "" for everything, else e.g. "turbo4 on V")."""
    bad = {(d.k, d.v) for d in differing}
    good = {(d.k, d.v) for d in agreeing} - bad
    names = ", ".join(sorted(f"{k}:{v}" for k, v in bad))
    agree = f"{', '.join(sorted(f'{k}:{v}' for k, v in good))} agree{'s' if len(good) == 1 else ''}"
    if not good:
        if any(k in UNQUANTIZED and v in UNQUANTIZED for k, v in bad):
            return "Every cell differs, those without a quantized cache among them.", ""
        return f"Every cell differs ({names}), and no f16:f16 is on both sides.", "the cache types"
    if len(bad) == 1:
        return f"Only {names} differs; {agree}.", names
    for reading, holds in _readings({t for pair in bad for t in pair}).items():
        if all(holds(*pair) for pair in bad) and not any(holds(*pair) for pair in good):
            return f"Every cell with {reading} differs ({names}) and no other; {agree}.", reading
    return f"{names} differ, {agree}: no single type explains which.", "the cache types"


def _cause(changed: dict[str, tuple[str, str]], kind: str) -> str:
    """Which recorded difference can do this; the strongest one speaks."""
    notable = [name for name in changed if name not in ("turbo-eval", "threads")]
    if not notable:
        return (
            "Nothing recorded explains it: the run is not deterministic, or the machine is faulty;"
            " repeat both with `--fresh`."
        )
    first = notable[0]
    a, b = changed[first]
    if first == "patched tree":
        others = [n for n in notable if n not in (first, *_FOLLOWS_FROM_TREE)]
        also = f" Also different: {_listed(others)}." if others else ""
        return (
            f"The trees differ: suspect what changed for {kind or 'all cells'} between {a} and {b};"
            f" `turbo-eval bisect` finds the commit.{also}"
        )
    if len(notable) == 1 and first == "K anchor" and kind.endswith("on V"):
        return "Only the K anchor differs, and that does not touch V: it does not explain this."
    if len(notable) == 1 and first in ("K anchor", "environment", "ubatch"):
        return f"Only the {first} differs ({a}; {b}): it explains this."
    for name in ("backend", "GPU", "CPU", "CPU features"):
        if name in notable and "patched tree" not in notable:
            if not kind:
                return f"Same tree, same model; the {name} differs ({a}; {b}), and not in the cache types."
            x, y = changed[name]
            return (
                f"Same tree, same model; the {name} differs: suspect the kernels for {kind} of"
                f" {x} or {y}; `turbo-eval selftest` on each says which."
            )
    return (
        f"Suspect the {first} first: {a} against {b}. Also different: {_listed(notable[1:] or ['nothing'])}."
    )


_FOLLOWS_FROM_TREE = frozenset({"upstream pin", "patch series", "build options", "compiler"})
