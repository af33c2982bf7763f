"""What to do next on this machine, for somebody who typed `turbo-eval` and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from turbo_eval.errors import TurboEvalError
from turbo_eval.llama.backends import BACKENDS
from turbo_eval.records.store import record_files
from turbo_eval.util import paths


@dataclass(frozen=True)
class Step:
    """A command to type, and what it gives."""

    command: str
    gives: str


def greeting() -> tuple[str, tuple[Step, Step, Step]]:
    """How far this machine is, in a sentence, and the three next commands. Looks at names of files alone."""
    try:
        root = paths.repo_root()
    except TurboEvalError:
        return "There is no project here yet.", (
            Step("turbo-eval init demo", "a folder that is set up: sweep, gate, workflows for CI"),
            Step("cd demo && turbo-eval build cpu", "llama.cpp with the new cache types"),
            Step("turbo-eval sweep turbo-eval/gates.toml", "a table of what each cache costs"),
        )
    clone = paths.project() is None
    first = "configs/demo.toml" if clone else "turbo-eval/gates.toml"
    if not _built(root):
        return "Nothing is built yet.", (
            Step("turbo-eval doctor", "what is missing, and what fixes it"),
            Step("make build-cpu" if clone else "turbo-eval build cpu", "llama.cpp with the new cache types"),
            Step("make demo" if clone else f"turbo-eval sweep {first}", "a table of what each cache costs"),
        )
    model = _model_on_record()
    if model is None:
        return "There is a build, and nothing is measured yet.", (
            Step(f"turbo-eval sweep {first}", "a table of what each cache costs, on a small model"),
            Step("turbo-eval sweep --model FILE.gguf", "the same for your own model"),
            Step("turbo-eval selftest", "is the build sound? Takes seconds"),
        )
    return f"There are records, most of them of {model}.", (
        Step("turbo-eval table", "what is on record"),
        Step(f"turbo-eval recommend {model} --max-delta-ppl 2%", "the smallest cache within a bound"),
        Step("turbo-eval report", "all of it as a page, report/index.html"),
    )


def _built(root: Path) -> bool:
    return any((root / "build" / name / "bin" / "llama-perplexity").is_file() for name in BACKENDS)


def _model_on_record() -> str | None:
    """The model of most records of this clone; None: there are none."""
    folder = paths.results_dir()
    if not folder.is_dir():
        return None
    reference = folder / "reference"  # measured by others
    files = [path for path in record_files([folder]) if reference not in path.parents]
    names = Counter(path.name.rsplit(".", 4)[0] for path in files if path.name.count(".") > 3)
    return names.most_common(1)[0][0] if names else None
