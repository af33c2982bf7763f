"""Which cell runs next on which class of machine: pure bookkeeping.

A comparison (one text through one build of one model, all pairs and metrics) stays on the class of
machine that took it first, because numbers differ between machines. Within it, a cell waits for the
cells that it is judged by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from turbo_eval.metrics import references
from turbo_eval.records.cell import Cell
from turbo_eval.records.reference import comparison


@dataclass
class Group:
    """The cells of one comparison: numbers in the plan. `memory_gib`: what the largest needs."""

    name: str
    memory_gib: float = 0.0
    numbers: list[int] = field(default_factory=list)
    pending: deque[int] = field(default_factory=deque)
    machine: str | None = None


class Placement:
    """The state of a sweep's cells.

    Args:
        cells: in the plan's order.
        memory_gib: of the device, that each needs.
    """

    def __init__(self, cells: Sequence[Cell], memory_gib: Sequence[float]) -> None:
        self.groups: dict[str, Group] = {}
        self._group: list[Group] = []
        self._done: set[int] = set()
        number_of = {cell.key(): number for number, cell in enumerate(cells)}
        self._before: list[tuple[int, ...]] = []
        for number, (cell, need) in enumerate(zip(cells, memory_gib, strict=True)):
            name = comparison(cell)
            group = self.groups.setdefault(name, Group(name))
            group.numbers.append(number)
            group.pending.append(number)
            group.memory_gib = max(group.memory_gib, need)
            self._group.append(group)
            keys = [reference.key() for reference in references(cell)]
            self._before.append(tuple(number_of[key] for key in keys if key in number_of))

    def group_of(self, number: int) -> Group:
        return self._group[number]

    @property
    def left(self) -> int:
        """Cells that are not done."""
        return len(self._group) - len(self._done)

    def take(
        self, machine: str, memory_gib: float, may: Callable[[Group, str], bool] = lambda *_: True
    ) -> int | None:
        """The next cell for a machine of this class; None if there is none now.

        Args:
            may: asked before a comparison that runs nowhere yet is given to this class.
        """
        ours = [group for group in self.groups.values() if group.machine == machine and group.pending]
        free = (group for group in self.groups.values() if group.machine is None and group.pending)
        for group in (*ours, *free):
            if group.machine is None and (group.memory_gib > memory_gib or not may(group, machine)):
                continue
            for number in group.pending:
                if all(other in self._done for other in self._before[number]):
                    group.pending.remove(number)
                    group.machine = machine
                    return number
        return None

    def give_back(self, number: int) -> None:
        """It was not measured; it goes first now."""
        self._group[number].pending.appendleft(number)

    def done(self, number: int) -> None:
        """There is a record of it, good or bad."""
        self._done.add(number)

    def is_done(self, number: int) -> bool:
        return number in self._done

    def release(self, machine: str) -> list[Group]:
        """The class is gone: comparisons of which nothing is measured yet may go elsewhere."""
        freed = []
        for group in self.groups.values():
            untouched = len(group.pending) == len(group.numbers)
            if group.machine == machine and untouched:
                group.machine = None
                freed.append(group)
        return freed
