"""Do the records, the build and the sources belong together?"""

from __future__ import annotations

from collections.abc import Iterable

from turbo_eval.errors import TurboEvalError
from turbo_eval.llama.build import Build, find_build
from turbo_eval.llama.provenance import machine
from turbo_eval.records.record import Record
from turbo_eval.util import paths


def moved_on(build: Build) -> str:
    """A sentence if the sources are not what the build was made from any more, else "".

    Folders of binaries that were not built here have no sources here.
    """
    if build.bin_dir != paths.build_dir(build.backend) / "bin" or build.current():
        return ""
    return (
        f"{paths.sources_dir(patched=build.patched)} was changed since the {build.backend} build of tree"
        f" {build.tree[:12]}; {paths.step(f'build-{build.backend}', f'build {build.backend}')}"
    )


def stale(records: Iterable[Record]) -> list[str]:
    """Sentences on records of this machine that are of another tree than its finished build, and on builds
    that the sources left behind."""
    here = machine().id
    trees: dict[str, dict[str, int]] = {}
    for record in records:
        if record.machine == here and not record.cell.tree.startswith("bin-"):
            counts = trees.setdefault(record.cell.backend, {})
            counts[record.cell.tree] = counts.get(record.cell.tree, 0) + 1
    said: list[str] = []
    for backend, counts in trees.items():
        try:
            build = find_build(backend)
            behind = moved_on(build)
        except TurboEvalError:
            continue  # no build here to compare with
        for tree, count in counts.items():
            if tree != build.tree:
                said.append(
                    f"stale: {count} records are of tree {tree[:12]}, the {backend} build is of"
                    f" {build.tree[:12]}; run the sweep again"
                )
        if behind:
            said.append(behind)
    return said
