"""Questions with choices: read from the hub or a file, and written as llama-perplexity's modes take them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from turbo_eval.errors import EnvironmentProblem, UsageError


@dataclass(frozen=True)
class Question:
    """`answer`: place of the right one among `choices`. Winogrande's text has a `_` where they go."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """A data set and how its rows are read.

    Attributes:
        place: arguments of datasets.load_dataset.
        split: of the data set.
        mode: of llama-perplexity.
        row: a row as a question.
    """

    place: tuple[str, ...]
    split: str
    mode: str
    row: Callable[[Mapping[str, Any]], Question]


def _hellaswag(row: Mapping[str, Any]) -> Question:
    return Question(f"{row['activity_label']}: {row['ctx']}", tuple(row["endings"]), int(row["label"]))


def _winogrande(row: Mapping[str, Any]) -> Question:
    return Question(row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def _arc(row: Mapping[str, Any]) -> Question:
    choices = row["choices"]
    answer = list(choices["label"]).index(row["answerKey"])
    return Question(_asked(row["question"]), tuple(choices["text"]), answer)


def _mmlu(row: Mapping[str, Any]) -> Question:
    return Question(_asked(row["question"]), tuple(row["choices"]), int(row["answer"]))


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


TASKS: dict[str, Task] = {
    "hellaswag": Task(("Rowan/hellaswag",), "validation", "hellaswag", _hellaswag),
    "winogrande": Task(("allenai/winogrande", "winogrande_xl"), "validation", "winogrande", _winogrande),
    "arc-easy": Task(("allenai/ai2_arc", "ARC-Easy"), "test", "multiple-choice", _arc),
    "arc-challenge": Task(("allenai/ai2_arc", "ARC-Challenge"), "test", "multiple-choice", _arc),
    "mmlu": Task(("cais/mmlu", "all"), "test", "multiple-choice", _mmlu),
}


def questions(name: str, count: int, file: str = "") -> list[Question]:
    """The first `count` questions of a task.

    Args:
        file: rows as JSON lines with the data set's own fields, in place of the hub's.

    Raises:
        UsageError: the file lacks a field, or there are fewer questions.
        EnvironmentProblem: the data set cannot be had.
    """
    import datasets  # noqa: PLC0415 takes a second to load

    task = TASKS[name]
    place = ("json",) if file else task.place
    more = {"data_files": file, "split": "train"} if file else {"split": task.split}
    try:
        rows = datasets.load_dataset(*place, **more)
    except Exception as error:  # the hub's client raises what its transport raises
        raise EnvironmentProblem(
            f"the questions of {name} cannot be had: {error}",
            f"give a file with its rows as JSON lines: tasks = {{ name = {name!r}, file = ... }}",
        ) from None
    if len(rows) < count:
        raise UsageError(f"{file or task.place[0]} has {len(rows)} questions, {count} are asked for")
    try:
        return [task.row(rows[i]) for i in range(count)]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{file or task.place[0]} is no {name}: {error!r}", "see its card on the hub"
        ) from None


def written(mode: str, asked: Iterable[Question]) -> bytes:
    """The file that a mode of llama-perplexity reads."""
    listed = list(asked)
    if mode == "hellaswag":  # six lines a question
        lines = [line for q in listed for line in (q.text, str(q.answer), *q.choices)]
        return "".join(_line(line) + "\n" for line in lines).encode()
    if mode == "winogrande":  # number,"sentence",choice,choice,answer
        rows = []
        for i, q in enumerate(listed):
            sentence, *choices = (_line(x).replace('"', "'") for x in (q.text, *q.choices))
            plain = ",".join(choice.replace(",", "") for choice in choices)
            rows.append(f'{i},"{sentence}",{plain},{q.answer + 1}\n')
        return ("".join(rows) + "\n").encode()  # it drops a newline at the end, and a last line without one
    bodies = [_string(q.text) + _choices(q) + struct.pack("<I", 0) for q in listed]
    at, places = 4 + 4 * len(bodies), []
    for body in bodies:
        places.append(at)
        at += len(body)
    return struct.pack(f"<I{len(bodies)}I", len(bodies), *places) + b"".join(bodies)


def _choices(q: Question) -> bytes:
    labels = struct.pack(f"<{len(q.choices)}i", *(int(i == q.answer) for i in range(len(q.choices))))
    return struct.pack("<I", len(q.choices)) + b"".join(map(_string, q.choices)) + labels


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<I", len(content)) + content


def _line(text: str) -> str:
    return " ".join(text.split())


def digest(content: bytes) -> str:
    """What says that two caches were asked the same."""
    return hashlib.sha256(content).hexdigest()[:16]
