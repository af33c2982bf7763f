"""Reference pages that are made of the code when the site is built: commands, settings, the record."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from turbo_eval.cli import COMMANDS, load
from turbo_eval.formats.cache_types import known_types
from turbo_eval.llama.backends import BACKENDS
from turbo_eval.metrics import METRICS
from turbo_eval.metrics import bounds as metric_bounds
from turbo_eval.records import cell, provenance, record
from turbo_eval.sweep.spec import Check, SweepSpec
from turbo_eval.util.project import Settings


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for name, text in (("cli", cli()), ("config", config_keys()), ("record", record_schema())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


# -- commands --------------------------------------------------------------------------------------------


def cli() -> str:
    """Every command with its usage, help, arguments and options, as typer knows them."""
    parts = [
        "# Commands\n",
        "Made from the program itself. `turbo-eval COMMAND --help` shows the same.\n",
        "What the exit codes mean: [statuses and exit codes](statuses.md).\n",
        "| command | what it does |\n|---|---|",
        *(f"| [{name}](#{name}) | {_cell(text)} |" for name, (_, text) in COMMANDS.items()),
        "",
    ]
    for name in COMMANDS:
        parts += _command(load(name), name, 2)
    return "\n".join(parts)


def _command(command: Any, name: str, depth: int) -> Iterator[str]:
    context = command.make_context(f"turbo-eval {name}", [], resilient_parsing=True)
    yield f"{'#' * depth} {name}\n"
    yield f"```\n{' '.join(command.get_usage(context).removeprefix('Usage:').split())}\n```\n"
    yield _help(command.help or "")
    rows = [found for p in command.params if (found := p.get_help_record(context)) is not None]
    if rows:
        yield "| option or argument | |\n|---|---|"
        yield from (f"| `{' '.join(term.split())}` | {_cell(text)} |" for term, text in rows)
        yield ""
    for inner, child in getattr(command, "commands", {}).items():
        yield from _command(child, f"{name} {inner}", depth + 1)


def _help(text: str) -> str:
    """Help as Markdown: paragraphs, and the indented lines and `turbo-eval …` paragraphs as examples."""
    out, examples = [], []
    for paragraph in re.sub(r"\[/?\w+\]", "", inspect.cleandoc(text)).split("\n\n"):
        if paragraph.startswith((" ", "turbo-eval ")):
            examples.append(inspect.cleandoc(paragraph))
        else:
            out.append(" ".join(paragraph.split()).replace("<", "&lt;"))
    if examples:
        out.append("```\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(out) + "\n"


# -- settings --------------------------------------------------------------------------------------------


def config_keys() -> str:
    """The keys of every TOML file that is read."""
    parts = [
        "# Settings in TOML\n",
        "Made from the models that check the files. An unknown key is refused, with the nearest known one.\n",
        f"Cache types: {_listed(known_types())}.\n",
        f"Metrics: {_listed(METRICS)}. Backends: {_listed(BACKENDS)}.\n",
        "## A sweep\n",
        "`turbo-eval sweep FILE` reads these at the top of the file. A gate has them below `[sweep]`.\n",
        *_model(SweepSpec, tables={m.name for m in METRICS.values() if m.options}),
        "`model`, `metric`, and `k` with `v` (every K with every V) are short forms.\n",
    ]
    for metric in METRICS.values():
        if metric.options is not None:
            parts += [f"### [{metric.name}]\n", _lead(metric.options), *_model(metric.options)]
    words = {key: f"bound on the figure of `{metric.name}`" for key, (metric, _) in metric_bounds().items()}
    parts += [
        "## A check of a gate\n",
        "`turbo-eval gate FILE` reads a sweep below `[sweep]`, and one `[[check]]` or more.\n",
        *_model(Check, words=words),
        "## turbo-eval/project.toml\n",
        "`turbo-eval init` writes it.\n",
        *_model(Settings),
    ]
    return "\n".join(parts)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _model(
    model: type[BaseModel], tables: set[str] | None = None, words: dict[str, str] | None = None
) -> Iterator[str]:
    told = attributes(model) | (words or {})
    yield "| key | type | default |" + (" |\n|---|---|---|---|" if told else "\n|---|---|---|")
    for name, field in model.model_fields.items():
        if name in (tables or set()):
            continue
        words_of_it = f" {_cell(told.get(name, ''))} |" if told else ""
        yield f"| `{name}` | {_cell(_kind(field.annotation))} | {_default(field)} |{words_of_it}"
    yield ""


def _lead(model: type[BaseModel]) -> str:
    """What the docstring says before its attributes."""
    return inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[0].replace("<", "&lt;") + "\n"


def attributes(model: type[BaseModel]) -> dict[str, str]:
    """Field → sentence, out of the "Attributes:" of the docstrings of a model and its bases."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        entries = re.split(r"^    (?=\w)", listed.split("\n\n")[0], flags=re.MULTILINE)
        for entry in filter(None, entries):
            names, colon, text = entry.partition(": ")
            if colon:
                found |= dict.fromkeys((n.strip() for n in names.split(",")), " ".join(text.split()))
    return found


_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "none"}


def _kind(annotation: Any) -> str:
    """A type in words, e.g. "list of whole number or "auto""."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in inner if part is not type(None))
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_kind(inner[0])}"
        return "K:V" if inner == (str, str) else f"[{', '.join(map(_kind, inner))}]"
    if origin is dict:
        return f"table of {_kind(inner[1])}"
    return _WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "" if field.default_factory is None else "empty"
    if value is None:
        return "none"
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


# -- record ----------------------------------------------------------------------------------------------


def record_schema() -> str:
    """The parts of a record, with what their docstrings say."""
    schema = record.Record.model_json_schema(mode="serialization")
    parts = [
        "# A record\n",
        "One JSON file a measurement. Made from the models that write it; the JSON Schema is"
        " [record.schema.json](record.schema.json), which `turbo-eval results schema` prints.\n",
    ]
    names = ["Record", *(name for name in schema["$defs"])]
    for name in names:
        found = next((getattr(m, name) for m in (record, cell, provenance) if hasattr(m, name)), None)
        if found is None:
            continue
        parts += [f"## {name}\n", _lead(found), *_model(found)]
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
