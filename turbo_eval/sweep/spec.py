"""TOML → validated models. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from turbo_eval.errors import TurboEvalError, UsageError
from turbo_eval.formats.cache_types import cache_type, known_types, parse_pair
from turbo_eval.llama.backends import BACKENDS
from turbo_eval.metrics import METRICS
from turbo_eval.metrics import bounds as metric_bounds
from turbo_eval.metrics.base import Metric, Options
from turbo_eval.records.cell import Engine
from turbo_eval.util import numbers as n
from turbo_eval.util.text import meant, read_toml

_M = TypeVar("_M", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


class _Sweep(_Strict):
    """What to run. Lists multiply: models × contexts × anchors × windows × metrics × pairs.

    Attributes:
        name: of the sweep, in messages; else the file's name.
        models: registry names or paths.
        corpus: registry name or path.
        pairs: (K, V) cache types.
        against: the pair that ΔPPL is taken against in place of f16:f16; measured too if it is not among
            the pairs. Older files call it `baseline`.
        reference: False: nothing is added for a comparison and no ΔPPL is shown.
        metrics: what to measure; "kld" also yields perplexity.
        ctx: context lengths in tokens.
        chunks: chunks of `ctx` tokens, from the start of the corpus.
        ubatch: physical batch in tokens.
        backend: where it runs; its build has to be there.
        anchor: "auto", "on", "off" or a file for --kv-anchor; None: "auto" where the build has it.
        profiles: KV profiles (docs/explanation/kv-profile.md), each a cell like a pair, on its model.
        recent, first: sizes of the exact window in tokens (docs/explanation/exact-window.md); "auto": 128 and
            4 for pairs with a type below 8 bits, where the build has the window, and a profile's own. Other
            pairs never have one.
        engine: "kv-eval": one process scores all caches of a comparison side by side and keeps figures of
            each token; what it cannot do goes to "llama-perplexity", one process a cell.
        threads: CPU threads; None: all cores.
        timeout: seconds a cell may take; None: as long as it goes on saying something.

    Beside these each metric that has settings has a table of its name.
    """

    name: str = "sweep"
    models: tuple[str, ...] = ("smollm2-135m",)
    corpus: str = "default"
    pairs: tuple[tuple[str, str], ...]
    profiles: tuple[str, ...] = ()
    against: tuple[str, str] | None = None
    reference: bool = True
    metrics: tuple[str, ...] = ("ppl",)
    ctx: tuple[n.Context, ...] = Field(default=(512,), min_length=1)
    chunks: n.Count = 8
    ubatch: n.Tokens = 512
    backend: str = "cpu"
    anchor: tuple[str, ...] | None = None
    recent: tuple[n.TokensOrAuto, ...] = Field(default=("auto",), min_length=1)
    first: n.TokensOrAuto = "auto"
    engine: Engine = "kv-eval"
    threads: n.Threads | None = None
    timeout: n.Seconds | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for one, many in (("model", "models"), ("metric", "metrics"), ("profile", "profiles")):
            if one in data:
                if many in data:
                    raise ValueError(f"give {one} or {many}, not both")
                data[many] = data.pop(one)
        for key in ("models", "metrics", "ctx", "anchor", "recent", "profiles"):
            if data.get(key) is not None:
                data[key] = _as_list(data[key])
        data["pairs"] = _pairs(data.pop("pairs", None), data.pop("k", None), data.pop("v", None))
        return _with_against(data)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRICS:
                raise ValueError(f"there is no metric {name!r}; known are {', '.join(METRICS)}")
        return value

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, value: str) -> str:
        if value not in BACKENDS:
            raise ValueError(f"there is no backend {value!r}; known are {', '.join(BACKENDS)}")
        return value

    def options(self, metric: Metric) -> Options | None:
        """The settings of a metric."""
        found = getattr(self, metric.name, None)
        return found if isinstance(found, Options) else None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.pairs and not self.profiles:
            raise ValueError('no K/V pairs; give pairs = ["q8_0:turbo3"], k and v, or profile = "FILE"')
        if self.against and not self.reference:
            raise ValueError("against names a reference, and reference = false wants none")
        return self


if TYPE_CHECKING:

    class SweepSpec(_Sweep):
        """See `_Sweep`."""
else:
    SweepSpec = create_model(
        "SweepSpec",
        __base__=_Sweep,
        __doc__=_Sweep.__doc__,
        **{m.name: (m.options, m.options()) for m in METRICS.values() if m.options},
    )


class _Check(_Strict):
    """One gate check. Every bound given must hold for every cell the patterns match.

    Attributes:
        pairs: K:V patterns as fnmatch takes them, e.g. "q8_0:turbo*".
        profile: instead: a pattern on the names of the profiles, e.g. "qwen*".
        name: in the verdict's sentences.
        model: pattern on the model's name.
        anchor: pattern on the anchor asked for.
        recent: the exact window's size in tokens; None: any.
        max_ppl, max_delta_pct: bounds on a number, beside those of the metrics (`Bound.key`).
        equivalent_within, not_worse_than: margins, in percent of perplexity, of a paired test with an error
            rate of 5 %: the change lies certainly within ± the margin, or certainly below it. What the text
            cannot tell is neither passed nor failed: the gate is incomplete, and says how much text would do.
        against: pair that max_delta_pct compares with; None: the sweep's. Older files call it `baseline`.
        must_fail: turns the check round: at least one bound must be broken, by a number.
        status: the status that is expected instead of a number, e.g. "nan".
    """

    pairs: tuple[str, ...] = ()
    profile: str | None = None
    name: str = ""
    model: str = "*"
    anchor: str = "*"
    recent: n.WholeTokens | None = None
    against: tuple[str, str] | None = None
    max_ppl: n.Perplexity | None = None
    max_delta_pct: n.Percent | None = None
    equivalent_within: n.Margin | None = None
    not_worse_than: n.Margin | None = None
    must_fail: bool = False
    status: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "pair" in data:
            data["pairs"] = [data.pop("pair")]
        if "pairs" in data:
            data["pairs"] = [_pattern(p) for p in _as_list(data["pairs"])]
        return _with_against(data)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if bool(self.pairs) == (self.profile is not None):
            raise ValueError("a check names pairs or a profile")
        if not self.bounds() and not self.tests() and self.status is None:
            raise ValueError("a check needs a bound (max_ppl, max_delta_pct, …) or a status")
        if self.must_fail and self.tests():
            raise ValueError("must_fail turns bounds round, not equivalent_within and not_worse_than")
        if self.status is not None and (self.bounds() or self.tests() or self.must_fail):
            raise ValueError("a check expects a status or bounds, not both")
        return self

    def bounds(self) -> dict[str, float]:
        """The bounds given, by field name."""
        names = ("max_ppl", "max_delta_pct", *metric_bounds())
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def tests(self) -> dict[str, float]:
        """The margins given, by field name."""
        names = ("equivalent_within", "not_worse_than")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


if TYPE_CHECKING:

    class Check(_Check):
        """See `_Check`."""
else:
    Check = create_model(
        "Check",
        __base__=_Check,
        __doc__=_Check.__doc__,
        **{key: (bound.kind | None, None) for key, (_, bound) in metric_bounds().items()},
    )


class GateSpec(_Strict):
    """A gate: the sweep whose records are judged and the checks on them."""

    sweep: SweepSpec
    check: tuple[Check, ...] = Field(min_length=1)


def _pattern(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no K:V pattern")
    text = value.replace("/", ":")
    text = text if ":" in text else f"{text}:{text}"
    sides = text.split(":")
    if len(sides) != 2:
        raise ValueError(f"{text!r} is no K:V pattern")
    for side in sides:
        if not any(letter in side for letter in "*?["):
            cache_type(side)  # a name that no type has would match nothing, for ever
        elif not any(fnmatchcase(name, side) for name in known_types()):
            raise ValueError(f"no cache type is like {side!r}; known are {', '.join(known_types())}")
    return text


def _with_against(data: dict[str, Any]) -> dict[str, Any]:
    """`against` as a pair, from the key's older name too."""
    if "baseline" in data:
        if "against" in data:
            raise ValueError("give against or baseline, not both")
        data["against"] = data.pop("baseline")
    if data.get("against") is not None:
        data["against"] = _pair(data["against"])
    return data


def _pair(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return parse_pair(value)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return parse_pair(f"{value[0]}:{value[1]}")
    raise ValueError(f'{value!r} is no K:V pair; write it like "q8_0:turbo3"')


def _pairs(pairs: Any, k: Any, v: Any) -> list[tuple[str, str]]:
    """Explicit pairs, or every k × v; duplicates are dropped, order is kept."""
    found: list[tuple[str, str]] = []
    if pairs is not None:
        found += [_pair(p) for p in _as_list(pairs)]
    if k is not None or v is not None:
        if k is None or v is None:
            raise ValueError("k and v belong together")
        found += [_pair([a, b]) for a in _as_list(k) for b in _as_list(v)]
    return list(dict.fromkeys(found))


def sweep_spec(data: dict[str, Any], source: str) -> SweepSpec:
    """Validate a sweep; `source` names it in errors.

    Raises:
        UsageError: anything wrong in it.
    """
    return _validated(SweepSpec, data, source)


def load_sweep_data(path: Path) -> dict[str, Any]:
    """The sweep part of a config file, unvalidated: a gate's [sweep] table or the whole file."""
    data = read_toml(path, what="config ", missing="see `ls configs`")
    inner = data.get("sweep")
    if isinstance(inner, dict):  # a gate's file, its checks perhaps still to be written
        beside = [key for key in data if key not in ("sweep", "check")]
        if beside:
            raise UsageError(f"{path}: {beside[0]!r} stands outside of [sweep]", "move it below [sweep]")
        return {"name": path.stem} | inner
    if "check" in data:
        raise UsageError(f"{path} has [[check]] but no [sweep]", "put what is measured below [sweep]")
    data.setdefault("name", path.stem)
    return data


def load_gate(path: Path, *, backend: str | None = None) -> GateSpec:
    """Read a gate.

    Args:
        backend: in place of the one that the sweep names.

    Raises:
        UsageError: anything wrong in it.
    """
    data = read_toml(path, what="config ", missing="see `ls configs`")
    if "check" in data and "sweep" not in data:
        raise UsageError(f"config {path} has no [sweep]", "put what is measured below [sweep]")
    if "check" not in data:
        raise UsageError(f"config {path} has no [[check]]", "add one, as in configs/gates.toml")
    if isinstance(data.get("sweep"), dict):
        data["sweep"].setdefault("name", path.stem)
        if backend is not None:
            data["sweep"]["backend"] = backend
    return _validated(GateSpec, data, str(path))


def _validated(model: type[_M], data: dict[str, Any], source: str) -> _M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            step = meant(key, _known_keys(model, first["loc"][:-1]), "remove it")
            raise UsageError(f"{source}: unknown key {where!r}", step) from None
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, TurboEvalError):
            raise UsageError(f"{source}: {cause.message}", cause.next_step) from None
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{source}: {where + ': ' if where else ''}{message}") from None
    except UsageError as error:
        raise UsageError(f"{source}: {error.message}", error.next_step) from None


_ALIASES = {SweepSpec: ("model", "metric", "profile", "k", "v", "baseline"), Check: ("pair", "baseline")}


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model that `loc` leads to."""
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        candidates = (field.annotation, *get_args(field.annotation))
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return [*model.model_fields, *_ALIASES.get(model, ())]
