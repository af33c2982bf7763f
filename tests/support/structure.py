"""How the package is built, counted: `python -m tests.support.structure` (part of `make check`).

Modules and functions have a bound on their lines, folders on their modules, and an import inside a function
needs its reason beside it. The order of the rooms is held by import-linter (`lint-imports`, pyproject.toml).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp

PACKAGE = Path(__file__).parents[2] / "turbo_eval"
MODULE_LINES, FUNCTION_LINES, FOLDER_MODULES, INNER_IMPORTS, LAYERS = 400, 80, 12, 40, 10
MANY = {"commands"}  # a folder of many small modules of one kind

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_modules() -> list[str]:
    """Modules over MODULE_LINES lines."""
    sizes = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    return [f"{_name(path)} has {n} lines" for path, n in sizes.items() if n > MODULE_LINES]


def long_functions() -> list[str]:
    """Functions over FUNCTION_LINES lines, decorators and docstring included."""
    found = []
    for path, function in _functions():
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        length = (function.end_lineno or first) - first + 1
        if length > FUNCTION_LINES:
            found.append(f"{_name(path)}: {function.name} has {length} lines")
    return found


def full_folders() -> list[str]:
    """Folders over FOLDER_MODULES modules."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {f: len(list(f.glob("*.py"))) for f in folders if f.name not in MANY}
    return [f"{_name(f)} has {n} modules" for f, n in counts.items() if n > FOLDER_MODULES]


def inner_imports() -> list[tuple[str, bool]]:
    """(place, does it give a reason) of each import inside a function: a comment on its line or above it."""
    found: dict[str, bool] = {}
    for path, function in _functions():
        lines = path.read_text().splitlines()
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                own, above = lines[node.lineno - 1], lines[node.lineno - 2]
                found[f"{_name(path)}:{node.lineno}"] = "#" in own or above.strip().startswith("#")
    return sorted(found.items())


def rooms() -> dict[str, set[str]]:
    """What each room (a module or folder of the package) imports of the other rooms."""
    graph = grimp.build_graph("turbo_eval", exclude_type_checking_imports=False)
    found: dict[str, set[str]] = {}
    for module in sorted(graph.modules):
        own = _room(module)
        others = {_room(other) for other in graph.find_modules_directly_imported_by(module)}
        found.setdefault(own, set()).update(others - {own, ""})
    found.pop("", None)
    return found


def layers(imports: dict[str, set[str]]) -> dict[str, int]:
    """Floor of each room: 1 for one that imports no other, else one above the highest that it imports.

    Raises:
        ValueError: rooms import one another in a circle.
    """
    floors: dict[str, int] = {}

    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise ValueError("a circle: " + " → ".join([*above[above.index(room) :], room]))
        if room not in floors:
            below = [floor(other, (*above, room)) for other in sorted(imports.get(room, ()))]
            floors[room] = 1 + max(below, default=0)
        return floors[room]

    for room in imports:
        floor(room)
    return floors


def _room(module: str) -> str:
    return ".".join(module.split(".")[1:2])


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def _functions() -> Iterator[tuple[Path, Function]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                yield path, node


def main() -> int:
    """Print the counts; 1 if one is over its bound."""
    faults = [*long_modules(), *long_functions(), *full_folders()]
    inner = inner_imports()
    faults += [f"{place}: an import inside a function without its reason" for place, why in inner if not why]
    if len(inner) > INNER_IMPORTS:
        faults.append(f"{len(inner)} imports inside functions")
    try:
        floors = layers(rooms())
    except ValueError as error:
        floors = {}
        faults.append(str(error))
    if max(floors.values(), default=0) > LAYERS:
        faults.append(f"{max(floors.values())} layers of rooms")
    highest, count = max(floors.values(), default=0), len(list(PACKAGE.rglob("*.py")))
    print(
        f"{count} modules in {len(floors)} rooms on {highest} layers, {len(inner)} imports inside functions;"
        f" bounds: {LAYERS} layers, {INNER_IMPORTS} such imports, {MODULE_LINES} lines a module,"
        f" {FUNCTION_LINES} a function, {FOLDER_MODULES} modules a folder"
    )
    for number in sorted(set(floors.values()), reverse=True):
        print(f"  {number:2}  {', '.join(sorted(room for room, at in floors.items() if at == number))}")
    for fault in faults:
        print(f"structure: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
