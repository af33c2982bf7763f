"""What the commands print stays as it was: after a change on purpose run `make golden` and read the diff."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.golden import GOLDEN, World, keys, world

NAMES = sorted(path.stem for path in GOLDEN.glob("*.txt"))


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with world() as found:
        yield found


def test_each_command_has_its_file(made: World) -> None:
    assert sorted([*made.commands(), "keys"]) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "keys"])
def test_output_and_exit_code(made: World, name: str) -> None:
    assert made.run(made.commands()[name]) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_keys_of_records() -> None:
    assert keys() == (GOLDEN / "keys.txt").read_text(encoding="utf-8")
