"""llama-server on real models, for each kind of KV cache; the table of it at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import absent
from tests.support.llama_server import Answer, LlamaServer, started
from turbo_eval.errors import TurboEvalError
from turbo_eval.inputs.kv_profile import Profile, model_shape, write_profile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.build import Build

ALONE = ["--kv-recent", "0", "--kv-first", "0"]  # without the exact window
KINDS: dict[str, list[str]] = {
    "f16": ["-ctk", "f16", "-ctv", "f16"],
    "q8_0": ["-ctk", "q8_0", "-ctv", "q8_0"],
    "turbo4": ["-ctk", "turbo4", "-ctv", "turbo4", *ALONE],
    "turbo3": ["-ctk", "turbo3", "-ctv", "turbo3", *ALONE],
    "q8_0/turbo3": ["-ctk", "q8_0", "-ctv", "turbo3", *ALONE],
    "window": ["-ctk", "turbo3", "-ctv", "turbo3"],  # as the server sets it by itself
    "profile": [],
}
MODELS = {"SmolLM2": "smollm", "Qwen": "qwen"}
DRIFT = 0.15  # nats
SHARED = ["-c", "4096", "-np", "4", "--kv-unified"]
# What runs without -m slow: the exact one, the default of ours, the same without its window; of the larger
# model what the small one can't show.
SHORT = {("SmolLM2", "f16"), ("SmolLM2", "turbo3"), ("SmolLM2", "window"), ("Qwen", "window")}
SHORT_QWEN = {"test_tool_call", "test_slot_restored_at_another_context_size", "test_says_what_it_runs"}


@dataclass
class Place:
    """A model with a kind of cache, and servers that have it."""

    model: str
    kind: str
    build: Build
    file: ModelFile
    folder: Path
    options: list[str]
    _logs: int = 0

    def own(self, *options: str, kind: Sequence[str] | None = None) -> AbstractContextManager[LlamaServer]:
        """A server of the test's own."""
        self._logs += 1
        log = self.folder / f"{self._logs}.log"
        base = ["--slot-save-path", str(self.folder), "--jinja", "-t", "1", "--seed", "1"]
        cache = self.options if kind is None else list(kind)
        return started(self.build, self.file.path, [*base, *cache, *options], log)


@dataclass(frozen=True)
class Likeness:
    """Answers that were computed in two ways.

    Attributes:
        shares: of each answer's tokens those before the first difference.
        drift: mean difference of the log-probabilities of those tokens, in nats.
        plain: the answers that were computed in the first way.
    """

    shares: tuple[float, ...]
    drift: float
    plain: tuple[Answer, ...] = field(repr=False)

    @classmethod
    def of(cls, a: Sequence[Answer], b: Sequence[Answer]) -> Likeness:
        shares, drifts = [], []
        for x, y in zip(a, b, strict=True):
            assert len(x.tokens) == len(y.tokens) > 0
            pairs = list(zip(x.tokens, y.tokens, strict=True))
            same = next((i for i, (s, t) in enumerate(pairs) if s != t), len(pairs))
            shares.append(same / len(pairs))
            drifts += [abs(p - q) for p, q in zip(x.logprobs[:same], y.logprobs[:same], strict=True)]
        return cls(tuple(shares), float(np.mean(drifts)) if drifts else float("inf"), tuple(a))

    @property
    def agreement(self) -> float:
        return float(np.mean(self.shares))

    def noise(self, other: Likeness) -> float:
        """Twice the standard error of the difference of two agreements, 0 where the other is complete."""
        errors = [np.std(x.shares, ddof=1) / len(x.shares) ** 0.5 for x in (self, other)]
        return 0.0 if other.agreement == 1 else 2 * float(np.hypot(*errors))

    def __str__(self) -> str:
        return "equal" if self.agreement == 1 else f"{self.agreement:.2f} ({self.drift:.3f})"


@dataclass
class Likenesses:
    """What f16 reaches in a scenario: measured once a model, when first asked for."""

    build: Build
    folder: Path
    known: dict[tuple[str, str], Likeness] = field(default_factory=dict)

    def check(self, scenario: Callable[[Place], Likeness], place: Place) -> Likeness:
        """No less agreement than f16's, minus the noise of so few answers; no drift that noise can't explain.

        Another order of computation rounds otherwise, and so may f16's answers part. A quantized cache makes
        more of the last bits: codes flip, and the two caches come to be as far from each other as each is
        from f16. So no more than that is allowed where it is more than f16's own. A wrong cell, position or
        constant moves log-probabilities by whole nats.
        """
        figure = scenario(place)
        key = (scenario.__name__, place.model)
        if place.kind == "f16":
            self.known[key] = figure
        elif key not in self.known:
            self.known[key] = scenario(make_place(place.model, "f16", self.build, place.file, self.folder))
        exact = self.known[key]
        from_f16 = Likeness.of(figure.plain, exact.plain)
        said = f"{figure}, f16 {exact}, from f16 {from_f16}"
        assert figure.agreement >= min(
            exact.agreement - figure.noise(exact), from_f16.agreement - figure.noise(from_f16)
        ), said
        assert figure.drift <= max(5 * exact.drift, DRIFT, 2 * from_f16.drift), said
        return figure


def make_place(model: str, kind: str, build: Build, file: ModelFile, folder: Path) -> Place:
    here = folder / f"{model}-{kind.replace('/', '-')}"
    here.mkdir(exist_ok=True)
    options = KINDS[kind] or ["--kv-profile", str(_profile(file, here))]
    return Place(model, kind, build, file, here, list(options))


def _profile(file: ModelFile, folder: Path) -> Path:
    """Types that differ by layer, with a window."""
    path = folder / "profile.gguf"
    if not path.is_file():
        shape = model_shape(file.path)
        k = ["q8_0" if layer == 0 else "turbo4" if layer % 2 else "turbo3" for layer in range(shape.n_layer)]
        v = ["turbo3" if layer % 3 else "turbo2" for layer in range(shape.n_layer)]
        write_profile(Profile(k, v, 128, 4), shape, path)
    return path


def _places() -> list[object]:
    return [
        pytest.param(
            (model, kind),
            id=f"{model}-{kind}",
            marks=[] if (model, kind) in SHORT else [pytest.mark.slow],
        )
        for model in MODELS
        for kind in KINDS
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="session")
def likenesses(build: Build, folder: Path) -> Likenesses:
    exact = folder / "exact"
    exact.mkdir()
    return Likenesses(build, exact)


@pytest.fixture(scope="module", params=_places())
def place(request: pytest.FixtureRequest, build: Build, folder: Path) -> Place:
    model, kind = request.param
    try:
        build.tool("llama-server")
    except TurboEvalError as error:
        absent(error)
    return make_place(model, kind, build, request.getfixturevalue(MODELS[model]), folder)


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[LlamaServer]:
    """One for all tests of a module that need nothing special: four slots in one cache."""
    with ExitStack() as stack:
        yield stack.enter_context(place.own(*SHARED))


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what the table shows for this test instead of "pass"."""
    return lambda words: request.node.user_properties.append(("session", words))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue  # the hook sees the tests of all folders
        callspec = getattr(item, "callspec", None)
        model, _ = callspec.params.get("place", ("", "")) if callspec is not None else ("", "")
        if model == "Qwen" and getattr(item, "originalname", "") not in SHORT_QWEN:
            item.add_marker(pytest.mark.slow)


# -- the table -----------------------------------------------------------------------------------------

_CELLS = pytest.StashKey[dict[tuple[str, str], str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CELLS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    callspec = getattr(item, "callspec", None)
    where = callspec.params.get("place") if callspec is not None else None
    if where is not None and (report.when == "call" or report.outcome != "passed"):
        said = dict(item.user_properties).get("session", "pass")
        word = {"passed": said, "failed": "FAIL", "skipped": "skipped"}[report.outcome]
        name = getattr(item, "originalname", item.name)
        item.config.stash[_CELLS][f"{name.removeprefix('test_')} ({where[0]})", where[1]] = str(word)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cells = config.stash[_CELLS]
    if not cells:
        return
    terminalreporter.section("sessions")
    kinds = [kind for kind in KINDS if any(column == kind for _, column in cells)]
    terminalreporter.write_line(f"| test | {' | '.join(kinds)} |")
    terminalreporter.write_line(f"|---|{'---|' * len(kinds)}")
    for name in dict.fromkeys(row for row, _ in cells):
        terminalreporter.write_line(f"| {name} | {' | '.join(cells.get((name, k), '') for k in kinds)} |")
