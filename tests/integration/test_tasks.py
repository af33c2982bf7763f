"""Questions with choices: small files in the data sets' own fields, through llama-perplexity's modes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Cli
from turbo_eval.errors import UsageError
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build
from turbo_eval.metrics.tasks import compare_tasks, outcomes
from turbo_eval.metrics.tasks.data import questions, written

ENDINGS = ["swims, far away.", "barks at the cat.", "reads the law.", "melts in the sun."]
ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {"activity_label": "Pets", "ctx": f"The dog number {i}", "endings": ENDINGS, "label": str(i % 4)}
        for i in range(4)
    ],
    "winogrande": [
        {
            "sentence": f'The "cup", {i} inches wide, fits in the box because the _ is large.',
            "option1": "cup",
            "option2": "box",
            "answer": str(1 + i % 2),
        }
        for i in range(4)
    ],
    "arc-easy": [
        {
            "question": f"What is {i} plus one?",
            "choices": {"text": [str(i + 1), "a tree", "blue"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
        for i in range(4)
    ],
    "mmlu": [
        {"question": "What do cows drink?", "choices": ["water", "steel", "fire", "sand"], "answer": i % 2}
        for i in range(4)
    ],
}


def rows_file(name: str, folder: Path) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return path


def test_rows_are_read_as_questions(tmp_path: Path) -> None:
    asked = {name: questions(name, 4, str(rows_file(name, tmp_path))) for name in ROWS}
    assert asked["hellaswag"][1].text == "Pets: The dog number 1"
    assert [q.answer for q in asked["hellaswag"]] == [0, 1, 2, 3]
    assert asked["winogrande"][0].choices == ("cup", "box")
    assert asked["arc-easy"][2].choices[asked["arc-easy"][2].answer] == "3"
    assert asked["mmlu"][0].text == "Question: What do cows drink?\nAnswer:"
    with pytest.raises(UsageError, match="has 4 questions, 5 are asked for"):
        questions("mmlu", 5, str(tmp_path / "mmlu.jsonl"))
    with pytest.raises(UsageError, match="is no arc-easy"):
        questions("arc-easy", 1, str(tmp_path / "mmlu.jsonl"))
    assert len(written("hellaswag", asked["hellaswag"]).splitlines()) == 6 * 4
    first = written("winogrande", asked["winogrande"]).splitlines()[0].decode()
    assert re.fullmatch(r"0,\"[^\"]*_[^\"]*\",cup,box,1", first)


def test_outcomes_follow_from_running_percentages() -> None:
    text = "1\t100.00000000%\t[20.6543%, 100.0000%]\n2\t50.00000000%\t[9%, 90%]\n3\t66.66666667%\t[1%, 2%]\n"
    assert outcomes(text) == "101"
    assert outcomes(text + "5\t60.0%\t[1%, 2%]\n") == "101", "a question is missing"
    told = compare_tasks("1100", "1011")
    assert (told["tasks_lost"], told["tasks_won"], told["tasks_right_pct"]) == (2, 1, 50)
    assert told["tasks_p"] == 1.0


@pytest.mark.build
@pytest.mark.parametrize("name", ROWS)
def test_asked_for_real(name: str, build: Build, smollm: ModelFile, tmp_path: Path) -> None:
    config = tmp_path / "tasks.toml"
    config.write_text(
        'pairs = ["q8_0:q8_0"]\nmetrics = ["tasks"]\nchunks = 1\n'
        f'tasks = {{ name = "{name}", questions = 4, file = "{rows_file(name, tmp_path)}" }}\n'
    )
    done = Cli(tmp_path / "results", build.bin_dir).sweep(config, "--json")
    assert done.returncode == 0, done.stderr
    rows = {r["k"]: r for r in json.loads(done.stdout)}
    assert set(rows) == {"f16", "q8_0"}, "f16 is added"
    assert all(len(r["tasks_right"]) == 4 for r in rows.values())
    assert rows["q8_0"]["tasks_f16_pct"] == rows["f16"]["tasks_right_pct"]
    if name == "arc-easy":
        assert rows["f16"]["tasks_right"] == "1111", "the others are no numbers"
    assert rows["f16"]["tasks_sha256"] == rows["q8_0"]["tasks_sha256"]
