"""A worker's build at the tree that a sweep measures: its own, or made from the same series."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from turbo_eval.errors import TurboEvalError
from turbo_eval.llama import build as builds
from turbo_eval.llama import patches, source
from turbo_eval.llama.build import Build
from turbo_eval.scale.wire import Source
from turbo_eval.scale.worker.content import RefusedError


def matching_build(wanted: Source, bin_dir: Path | None, device: AbstractContextManager[object]) -> Build:
    """The build at `wanted.tree`; built once, from this checkout, if its pin and series are the same.

    Args:
        bin_dir: the only build that may be used; None: the checkout's.
        device: entered to build, so that a cell that runs has the machine to itself.

    Raises:
        RefusedError: there is none and none can be made; says why.
    """
    if bin_dir is not None:
        given = Build.from_bin_dir(bin_dir)
        if given.tree != wanted.tree:
            raise RefusedError(
                f"its build in {bin_dir} is of tree {given.tree[:16]}, the sweep measures {wanted.tree[:16]}",
                "start it with the same build",
            )
        return given
    try:
        own: Build | None = builds.find_build(wanted.backend)
    except TurboEvalError:
        own = None
    if own is not None and own.tree == wanted.tree:
        return own
    if wanted.tree.startswith("bin-"):
        raise RefusedError(
            f"the sweep measures a build of its own ({wanted.tree[:16]}), which this worker does not have",
            "start it with --bin-dir and the same binaries",
        )
    has = f"has tree {own.tree[:12]}" if own else "has no build"
    try:
        pin, series = source.pin(), patches.series_sha256() if wanted.series else ""
    except TurboEvalError as error:
        raise RefusedError(f"it {has}, not {wanted.tree[:12]}, and no checkout: {error.message}") from None
    if (pin, series) != (wanted.pin, wanted.series):
        raise RefusedError(
            f"it {has} and another patch series: {series[:12]} on {pin[:12]} instead of"
            f" {wanted.series[:12]} on {wanted.pin[:12]}",
            "bring its checkout to the sweep's commit",
        )
    if wanted.dirty:
        raise RefusedError(
            f"it {has}, and the sweep's {wanted.tree[:12]} has edits that the series does not hold",
            "commit and refresh the series, then update the worker",
        )
    try:
        with device:
            made, _ = builds.build(wanted.backend, tools=["minimal"], patched=bool(wanted.series))
    except TurboEvalError as error:
        raise RefusedError(f"it could not build tree {wanted.tree[:12]}: {error.message}") from None
    if made.tree != wanted.tree:
        raise RefusedError(
            f"its sources build tree {made.tree[:12]}, the sweep measures {wanted.tree[:12]}",
            "drop the edits there, or bring them to the sweep's commit",
        )
    return made
