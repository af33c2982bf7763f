"""docs/how-to/diagnosing.md names commands and options that exist."""

from __future__ import annotations

import re
import shlex

import pytest

from turbo_eval.cli import load
from turbo_eval.util import paths

TEXT = (paths.repo_root() / "docs" / "how-to" / "diagnosing.md").read_text().replace("\\\n", " ")
COMMANDS = re.findall(r"^\$ turbo-eval (.+)$", TEXT, re.MULTILINE)


def test_all_four_are_told() -> None:
    assert {command.split()[0] for command in COMMANDS} >= {"selftest", "compare", "bisect", "probe"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str) -> None:
    name, *args = shlex.split(command)
    load(name).make_context(name, args)  # raises on an unknown option
