"""What `turbo-eval init` writes into a fork of llama.cpp, or into an empty folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from packaging.version import Version

from turbo_eval import __version__
from turbo_eval.errors import UsageError
from turbo_eval.formats.cache_types import BOOKS
from turbo_eval.util import paths, project
from turbo_eval.util.files import atomic_write

RUN = Path(".github") / "workflows" / "turbo-eval-run.yml"
TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Written:
    """One file: `what` happened to it, and what it is `about`."""

    path: Path
    what: Literal["wrote", "kept", "same"]
    about: str


def is_llama(folder: Path) -> bool:
    """Are these the sources of llama.cpp?"""
    return all(
        (folder / place).is_file() for place in ("CMakeLists.txt", "ggml/include/ggml.h", "include/llama.h")
    )


def knows_turbo(folder: Path) -> bool:
    """Do these sources of llama.cpp have our types already, as far as a first gate asks for them?"""
    text = (folder / "ggml" / "include" / "ggml.h").read_text(errors="replace")
    return all(f"GGML_TYPE_{book.name.upper()}" in text for book in BOOKS.values() if book.gate_kld)


def init(
    folder: Path, *, patched: bool | None = None, package: str | None = None, force: bool = False
) -> list[Written]:
    """Write project, gate, how-to and workflows; files that are there stay as they are.

    A checkout of llama.cpp is evaluated itself, without our patches; elsewhere it is the pinned
    upstream with them.

    Args:
        patched: with our patches or without, if that isn't what is wanted.
        package: what pip installs in CI; this version of turbo-eval if None.
        force: overwrite.

    Raises:
        UsageError: it is a checkout of turbo-eval, or no folder.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "name a folder")
    if (folder / "patches" / "series").is_file():
        raise UsageError(
            f"{folder} is a checkout of turbo-eval, which needs no init",
            "name a fork of llama.cpp or a new folder",
        )
    here = is_llama(folder)
    patched = not here if patched is None else patched
    turbo = patched or (here and knows_turbo(folder))
    settings = {"source": "here" if here else "pinned", "patches": "true" if patched else "false"}
    own = Path(project.FOLDER)
    files: dict[Path, tuple[str, str]] = {
        own / project.FILE: (_filled("project.toml", settings), "what is built"),
        own / "gates.toml": (
            _filled(
                "gates-turbo.toml" if turbo else "gates-plain.toml",
                {"books": [b for b in BOOKS.values() if b.gate_kld]},
            ),
            "what is measured and what must hold",
        ),
        own / "README.md": (_filled("README.md", {}), "how to use it"),
        own / ".gitignore": ("/build/\n/results/\n", "builds and records stay out of git"),
        RUN.with_name("turbo-eval.yml"): (
            _filled("turbo-eval.yml", {"package": package or _this_version()}),
            "CI: Linux CPU, Vulkan without a GPU, macOS Metal, CUDA on your own runner",
        ),
        RUN: ((paths.shipped_workflows() / RUN.name).read_text(), "its steps"),
    }
    return [_write(folder / place, text, about, force=force) for place, (text, about) in files.items()]


def _filled(template: str, values: Mapping[str, object]) -> str:
    """The template with `@{ name }@` and `@% for … %@` filled in: workflows have `${{ }}` of their own."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        variable_start_string="@{",
        variable_end_string="}@",
        block_start_string="@%",
        block_end_string="%@",
        comment_start_string="@#",
        comment_end_string="#@",
    )
    return environment.get_template(template).render(values)


def _this_version() -> str:
    """A requirement: this release, or the newest where this is none."""
    version = Version(__version__)
    return "turbo-eval" if version.is_devrelease or version.local else f"turbo-eval=={version}"


def _write(path: Path, text: str, about: str, *, force: bool) -> Written:
    if path.exists():
        if path.is_file() and path.read_text(errors="replace") == text:
            return Written(path, "same", about)
        if not force:
            return Written(path, "kept", about)
    with atomic_write(path) as stream:
        stream.write(text.encode())
    path.chmod(0o644)
    return Written(path, "wrote", about)
