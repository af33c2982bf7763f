"""Small random models of every architecture at the pin: what types, anchor and window do there.

`python -m tests.support.archs` runs llama.cpp's test-llama-archs -kv of the build in build/cpu, and writes
configs/architectures.json and the table of docs/reference/models.md from what it says; with --page only the
table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_eval.llama.build import find_build
from turbo_eval.util import paths

TOOL = "test-llama-archs"
KNOWN = Path("configs/architectures.json")
PAGE = Path("docs/reference/models.md")
TYPES = ("q8_0", "q4_0", "turbo4", "turbo3", "turbo2")
_BEGIN, _END = "<!-- table: python -m tests.support.archs -->", "<!-- /table -->"
_REFUSED = re.compile(r"^.*?is not possible: |; switch it off.*$|^\w+: ")


@dataclass(frozen=True)
class Case:
    """One line of the test. `kld` in nats from an f32 cache, nan where the context was refused."""

    arch: str
    kind: str
    name: str
    kld: float
    status: str
    said: str
    window: str


def run(binary: Path, *args: str) -> tuple[list[Case], str]:
    """The cases, and all that was printed."""
    done = subprocess.run(
        [binary, "-kv", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=800,
    )
    cases = []
    for line in done.stdout.splitlines():
        if line.startswith("|") and line.endswith("|"):
            arch, kind, name, kld, status, said, window = line[1:-1].split("|")
            cases.append(Case(arch, kind, name, float(kld), status, said, window))
    return cases, f"{done.stdout[-2000:]}\nexit code {done.returncode}"


def answers(cases: list[Case]) -> dict[str, Any]:
    """By architecture: "on", or why not, for the anchor, the window and each type."""
    found: dict[str, Any] = {}
    for case in cases:
        known = found.setdefault(case.arch, {"anchor": "", "window": "", "types": {}, "kld": {}})
        if case.status == "OK":
            known["kld"][case.name] = max(known["kld"].get(case.name, 0.0), float(f"{case.kld:.2g}"))
        if case.name == "exact":
            known["anchor"] = _answer(case.said.rpartition("-> ")[2])
        elif case.name == "window":
            refused = _REFUSED.sub("", _REFUSED.sub("", case.said))
            known["window"] = "on" if case.window.startswith("recent") else refused
        elif case.name in TYPES:
            known["types"][case.name] = "on" if case.status == "OK" else _REFUSED.sub("", case.said)
    return dict(sorted(found.items()))


def _answer(said: str) -> str:
    """ "on", or what is in the parentheses of "off (reason)"."""
    return "on" if said.startswith("on") else said.removeprefix("off (").removesuffix(")")


def render(known: dict[str, Any]) -> str:
    """The table of docs/reference/models.md, between its marks."""
    lines = [
        _BEGIN,
        "| architecture | q8_0, q4_0 | turbo4, turbo3, turbo2 | K anchor | exact window "
        "| KLD of turbo4, anchor off → on |",
        "|---|---|---|---|---|---|",
    ]
    for arch, answer in known.items():
        kinds = [_together(answer["types"], names) for names in (TYPES[:2], TYPES[2:])]
        off, on = (answer["kld"].get(name) for name in ("turbo4 off", "turbo4"))
        kld = f"{off:.2g} → {on:.2g}" if off is not None and answer["anchor"] == "on" else ""
        cells = [arch, *kinds, *(_cell(answer[part]) for part in ("anchor", "window")), kld]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, _END])


def _cell(answer: str) -> str:
    return "yes" if answer == "on" else f"no: {answer}"


def _together(types: dict[str, str], names: tuple[str, ...]) -> str:
    found = list(dict.fromkeys(types[name] for name in names))
    return "yes" if found == ["on"] else "no: " + "; ".join(answer for answer in found if answer != "on")


def page_with(table: str, page: str) -> str:
    """`page` with its table replaced."""
    before, _, rest = page.partition(_BEGIN)
    return before + table + rest.partition(_END)[2]


def main() -> int:
    root = paths.repo_root()
    if "--page" not in sys.argv:
        cases, said = run(find_build("cpu").tool(TOOL))
        if not cases or any(case.status == "FAIL" for case in cases):
            print(said)
            return 1
        found = json.dumps(answers(cases), indent=1, ensure_ascii=False)
        (root / KNOWN).write_text(found + "\n", encoding="utf-8")
    known = json.loads((root / KNOWN).read_text(encoding="utf-8"))
    page = (root / PAGE).read_text(encoding="utf-8")
    (root / PAGE).write_text(page_with(render(known), page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
