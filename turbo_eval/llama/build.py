"""Builds: one folder a backend under build/, stamped with what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.llama import cmake, patches, source, toolchain
from turbo_eval.llama.backends import backend as find_backend
from turbo_eval.llama.backends import cmake_options, of_libraries
from turbo_eval.util import paths
from turbo_eval.util.files import atomic_write, file_sha256, lock
from turbo_eval.util.git import working_tree_hash
from turbo_eval.util.project import BESIDE_THE_SOURCES
from turbo_eval.util.text import meant

# Targets by the place of their source: those are built whose source is there. Part of a series (bisect), or
# somebody's fork, may lack some. The first set measures.
MINIMAL = {
    "tools/perplexity": "llama-perplexity",
    "tools/llama-bench": "llama-bench",
    "tools/completion": "llama-completion",
    "tools/quantize": "llama-quantize",
    "tools/kv-calibrate": "llama-kv-calibrate",
    "tools/kv-eval": "llama-kv-eval",
    "tools/kv-probe": "llama-kv-probe",
}
# This one runs models for people.
SERVING = {
    "tools/server": "llama-server",
    "tools/cli": "llama-cli",
    "tools/tokenize": "llama-tokenize",
    "tools/batched-bench": "llama-batched-bench",
    "examples/speculative": "llama-speculative",
    "examples/speculative-simple": "llama-speculative-simple",
}
TOOLS = MINIMAL | SERVING
ALL = ("all",)
# llama.cpp's own tests, for whoever changes the patches: in a project nobody asks for them.
TESTS = {
    "tests/test-backend-ops.cpp": "test-backend-ops",
    "tests/test-quantize-fns.cpp": "test-quantize-fns",
    "tests/test-kv-window.cpp": "test-kv-window",
    "tests/test-llama-archs.cpp": "test-llama-archs",
    "tests/test-kv-session.cpp": "test-kv-session",
}
_COMMON = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",  # llama-cpp-python loads them
    "GGML_NATIVE": "ON",
    # nothing that downloads (the server's web page would) or needs another library
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_EXAMPLES": "ON",
    "LLAMA_BUILD_TESTS": "ON",
}
_RECORD = "turbo-eval-build.json"


@dataclass(frozen=True)
class Build:
    """A built llama.cpp.

    Attributes:
        backend: name of one of the backends; for a foreign folder what its libraries say.
        bin_dir: executables and shared libraries.
        tree: git tree hash of the sources it was built from, uncommitted edits included;
            for a foreign folder "bin-" + a hash of its libraries and tools.
        pin: upstream commit under the patches; for a foreign folder the (short) commit it reports.
        dirty: the sources had edits that the series does not hold.
        compiler: e.g. "c++ (Debian 12.2.0-14) 12.2.0".
        flags: CMake options that were set, "KEY=VALUE".
        stamp: hash of tree + options + compiler; "" for a foreign folder. Whatever of our tools lies in
            `bin_dir` was made of that.
        patched: our series was on the sources, as we put it there.
    """

    backend: str
    bin_dir: Path
    tree: str
    pin: str
    dirty: bool
    compiler: str
    flags: tuple[str, ...]
    stamp: str
    patched: bool = True

    @classmethod
    def from_bin_dir(cls, path: Path) -> Build:
        """Describe any folder of llama.cpp binaries (unpatched upstream, a fork).

        Raises:
            UsageError: no llama-perplexity in it, or it doesn't run.
        """
        bin_dir = path.expanduser().resolve()
        tool = bin_dir / "llama-perplexity"
        if not tool.is_file():
            raise UsageError(
                f"{path} holds no llama-perplexity", "name the bin folder of a finished llama.cpp build"
            )
        own = _read_record(bin_dir.parent)
        if own is not None and own.bin_dir == bin_dir:
            return own
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise UsageError(
                f"{tool} does not run (exit code {done.returncode})", "build it again for this machine"
            )
        said = done.stderr + done.stdout
        version = re.search(r"version: \S+ \(([0-9a-f]+)\)", said)
        compiler = re.search(r"built with (.+?)(?: for |$)", said, re.MULTILINE)
        libraries = [
            entry
            for entry in sorted(bin_dir.iterdir())
            if re.match(r"lib(ggml|llama|mtmd).*\.(so|dylib)", entry.name) and not entry.is_symlink()
        ]
        digest = hashlib.sha256()
        for file in [*libraries, tool]:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        names = " ".join(entry.name for entry in libraries)
        backend = of_libraries(names)
        return cls(
            backend=backend,
            bin_dir=bin_dir,
            tree=f"bin-{digest.hexdigest()[:40]}",
            pin=version[1] if version else "",
            dirty=False,
            compiler=compiler[1] if compiler else "",
            flags=(),
            stamp="",
            patched=False,
        )

    def tool(self, name: str) -> Path:
        """Path of an executable, e.g. `tool("llama-perplexity")`.

        Raises:
            EnvironmentProblem: this build does not have it.
        """
        path = self.bin_dir / name
        if not path.is_file():
            raise EnvironmentProblem(
                f"the {self.backend} build has no {name} in {self.bin_dir}",
                paths.step(f"build-{self.backend}", f"build {self.backend}"),
            )
        return path

    def current(self) -> bool:
        """Was it built from the sources as they are now? Foreign folders always are."""
        if not self.stamp:
            return True
        sources = paths.sources_dir(patched=self.patched)
        return sources.is_dir() and _tree(sources) == self.tree


def find_build(backend: str) -> Build:
    """The finished build of a backend, as stamped.

    Raises:
        UsageError: no such backend.
        EnvironmentProblem: not built, or the build was interrupted.
    """
    find_backend(backend)
    folder = paths.build_dir(backend)
    found = _read_record(folder)
    if found is None:
        what = "was not finished" if (folder / "build.ninja").is_file() else "is not there"
        raise EnvironmentProblem(
            f"the {backend} build {what}", paths.step(f"build-{backend}", f"build {backend}")
        )
    return found


def options(backend: str, *, cuda_archs: str = "") -> dict[str, str]:
    """CMake options of a backend, after checking that its toolchain is here.

    Raises:
        EnvironmentProblem: no compiler for it on this machine.
    """
    toolchain.cxx()
    return _COMMON | cmake_options(backend) | find_backend(backend).toolchain(cuda_archs)


@dataclass(frozen=True)
class _Order:
    """What is to be built: from where, how, and what will then be on record."""

    sources: Path
    chosen: dict[str, str]
    targets: tuple[str, ...]
    made: Build


def build(
    backend: str,
    *,
    jobs: int | None = None,
    cuda_archs: str = "",
    extra: Sequence[str] = (),
    tools: Sequence[str] = ALL,
    targets: Sequence[str] | None = None,
    patched: bool | None = None,
    console: Console | None = None,
) -> tuple[Build, bool]:
    """Build the sources of this checkout or project; returns the build and whether anything had to be done.

    A series that changed since it was applied is applied first, unless build/src has edits of
    its own: then those are built, and the build says that it is dirty.

    Args:
        jobs: compilers at a time; all cores if None.
        cuda_archs: CMake's list, e.g. "86-real;90-real".
        extra: further options "KEY=VALUE", e.g. for sanitizers.
        tools: names of TOOLS, "minimal" (what measures), "all"; those are built that the sources have, in a
            checkout TESTS as well.
        targets: exactly these instead.
        patched: with our series; None: as the project says.

    Raises:
        EnvironmentProblem: source or toolchain missing, or the compiler failed.
        UsageError: the series doesn't go onto these sources, or no such tool.
    """
    console = console or Console(stderr=True)
    find_backend(backend)
    folder = paths.build_dir(backend)
    with lock(folder / "build"):
        order = _order(backend, cuda_archs, extra, targets, patched, tools)
        made = order.made
        old = _read_record(folder)
        built = old is not None and old.stamp == made.stamp
        if built and all((made.bin_dir / target).is_file() for target in order.targets):
            if old != made:  # another commit with the same tree
                _write_record(folder, made)
            return made, False
        # From here until the end no one may take this folder for a finished build.
        (folder / _RECORD).unlink(missing_ok=True)
        if not built:  # nor a tool of other sources, which this run would leave as it is, for one of these
            for other in {*TOOLS.values(), *TESTS.values()} - set(order.targets):
                (made.bin_dir / other).unlink(missing_ok=True)
        log = folder / "build.log"
        cmake.configure(order.sources, folder, order.chosen, made.compiler, log)
        cmake.compile_shown(folder, order.targets, jobs or os.cpu_count() or 2, log, backend, console)
        if _tree(order.sources) != made.tree:
            again = paths.step(f"build-{backend}", f"build {backend}")
            raise EnvironmentProblem(f"{order.sources} was edited while it was built", f"{again} again")
        _write_record(folder, made)
    return made, True


def stamp(
    backend: str, *, cuda_archs: str = "", extra: Sequence[str] = (), patched: bool | None = None
) -> str:
    """What `build` with these arguments would make, as one hash; prepares the sources, compiles nothing.

    Raises:
        EnvironmentProblem, UsageError: as `build`.
    """
    find_backend(backend)
    with lock(paths.build_dir(backend) / "build"):
        return _order(backend, cuda_archs, extra, None, patched, ALL).made.stamp


def _wanted(tools: Sequence[str]) -> dict[str, str]:
    """Place of the source → target, of names of tools, "minimal" and "all"."""
    by_name = {target: {place: target} for place, target in TOOLS.items()}
    known = {"all": TOOLS, "minimal": MINIMAL} | by_name
    for name in tools:
        if name not in known:
            raise UsageError(f"no tool {name!r} to build", meant(name, known))
    return {place: target for name in tools for place, target in known[name].items()}


def _order(
    backend: str,
    cuda_archs: str,
    extra: Sequence[str],
    targets: Sequence[str] | None,
    patched: bool | None,
    tools: Sequence[str],
) -> _Order:
    wanted = _wanted(tools)
    chosen = options(backend, cuda_archs=cuda_archs)
    for item in extra:
        key, equals, value = item.removeprefix("-D").partition("=")
        if not equals:
            raise UsageError(f"{item} is no CMake option", "write it as KEY=VALUE")
        chosen[key.split(":")[0]] = value
    compiler = ", ".join(filter(None, (toolchain.cxx().version, find_backend(backend).compiler())))
    project = paths.project()
    if patched is None:
        patched = project is None or project.settings.patches
    dirty = _prepare(patched)
    sources = paths.sources_dir(patched=patched)
    if targets is None:
        wanted = wanted if project is not None else wanted | TESTS
        targets = [target for place, target in wanted.items() if (sources / place).exists()]
        if "llama-perplexity" not in targets:
            raise UsageError(f"{sources} has no tools/perplexity", "take a llama.cpp of 2025 or newer")
    tree = _tree(sources)
    flags = tuple(f"{key}={value}" for key, value in sorted(chosen.items()))
    described = json.dumps([tree, flags, compiler])
    made = Build(
        backend=backend,
        bin_dir=paths.build_dir(backend) / "bin",
        tree=tree,
        pin=source.pin(),
        dirty=dirty,
        compiler=compiler,
        flags=flags,
        stamp=hashlib.sha256(described.encode()).hexdigest(),
        patched=patched,
    )
    return _Order(sources, chosen, tuple(targets), made)


def _prepare(patched: bool) -> bool:
    """Bring the sources to what is to be built; whether they have edits that no commit or patch holds."""
    project = paths.project()
    if project is not None and project.here:
        edits = source.own_edits(project)
        if not patched:
            return edits
        if edits:  # the patches go onto a commit; edits would silently be left out
            raise UsageError(
                f"{project.folder} has edits that are not committed, and the patches go onto its HEAD",
                "commit them, or build with --no-patches",
            )
    if project is not None:
        source.ensure_source()
    if not patched:
        return not source.state().clean
    before = patches.status()
    if not before.dirty and not before.stopped:
        before = patches.apply()
    return before.dirty or not before.applied


def _tree(sources: Path) -> str:
    """Hash of the sources as they lie there; what `turbo-eval init` wrote among them doesn't count."""
    project = paths.project()
    own = project is not None and sources == project.folder
    return working_tree_hash(sources, without=BESIDE_THE_SOURCES if own else ())


def _read_record(folder: Path) -> Build | None:
    try:
        data = json.loads((folder / _RECORD).read_text())
        return Build(**(data | {"bin_dir": folder / data["bin_dir"], "flags": tuple(data["flags"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_record(folder: Path, made: Build) -> None:
    with atomic_write(folder / _RECORD) as stream:
        stream.write(json.dumps(asdict(made) | {"bin_dir": "bin"}, indent=1).encode())
