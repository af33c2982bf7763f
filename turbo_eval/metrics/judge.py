"""Decide what a finished process amounts to. Pure: a mismatch is a status, never a number."""

from __future__ import annotations

from turbo_eval.formats.window import Window
from turbo_eval.llama import output
from turbo_eval.llama.backends import backend
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Effective, Status, finite
from turbo_eval.util.process import Outcome

Fault = tuple[Status, str]


def judge_process(outcome: Outcome, timeout: float | None) -> Fault | None:
    """How the process ended, if it ended badly."""
    if outcome.timed_out:
        if timeout is not None and outcome.seconds >= timeout:
            return "timeout", f"no result within {timeout:g} s"
        return "timeout", f"it said nothing for a long time and was ended after {outcome.seconds:.0f} s"
    if outcome.stopped or outcome.returncode == 0:
        return None
    refused = output.refusal(outcome.text)
    if refused and outcome.returncode and outcome.returncode > 0:
        return "refused", refused
    if name := outcome.signal_name():
        reason = output.last_error(outcome.text)
        return "crash", f"killed by {name}" + (f": {reason}" if reason else "")
    reason = output.last_error(outcome.text) or "it gave no reason"
    return "crash", f"exit code {outcome.returncode}: {reason}"


def judge_state(cell: Cell, effective: Effective) -> Fault | None:
    """What runs against what was asked for, if they differ."""
    wanted, ran = (cell.k, cell.v), (effective.k, effective.v)
    if cell.profile is not None:
        wanted = cell.profile.types_k, cell.profile.types_v
        ran = effective.types_k or effective.k, effective.types_v or effective.v
    for side, asked, got in zip("KV", wanted, ran, strict=True):
        if got is None:
            return "type-mismatch", f"llama.cpp did not say which {side} type it runs"
        if got != asked:
            return "type-mismatch", f"{side} was to be {asked} but runs as {got}"
    if effective.flash_attn is not None and effective.flash_attn != cell.flash_attn:
        return "state-mismatch", f"flash attention is {'on' if effective.flash_attn else 'off'}"
    if effective.ctx is not None and effective.ctx < cell.ctx:
        return "state-mismatch", f"the context is {effective.ctx} tokens, asked for were {cell.ctx}"
    anchor = (effective.anchor or "").split(" ")[0]
    if cell.anchor == "off" and anchor == "on":
        return "state-mismatch", f"the K anchor was to be off but is {effective.anchor}"
    if cell.anchor not in ("off", "auto") and anchor != "on":
        return "state-mismatch", f"the K anchor was to be {cell.anchor} but is {anchor or 'not reported'}"
    window = Window(effective.recent or 0, effective.first or 0)
    if window != cell.window:
        return "state-mismatch", f"the exact window was to be {cell.window} but is {window}"
    if effective.config_files:
        return "state-mismatch", f"llama.cpp also read options from {effective.config_files[0]}"
    return _judge_device(cell, effective)


def _judge_device(cell: Cell, effective: Effective) -> Fault | None:
    if not backend(cell.backend).gpu:
        return None
    if effective.layers_offloaded is None:
        return "cpu-fallback", "no layer was offloaded to the GPU"
    if effective.layers and effective.layers_offloaded < effective.layers:
        return "cpu-fallback", (f"{effective.layers_offloaded} of {effective.layers} layers are on the GPU")
    for device in effective.kv_devices:
        if device.upper().startswith("CPU"):
            return "cpu-fallback", f"part of the KV cache lies in {device} memory"
    # One attention operation on the CPU splits the graph at least once in every layer.
    if effective.graph_splits and effective.kv_layers and effective.graph_splits >= effective.kv_layers:
        return "cpu-fallback", (
            f"the graph is split {effective.graph_splits} times over {effective.kv_layers} layers:"
            " attention runs on the CPU"
        )
    return None


def judge_numbers(cell: Cell, text: str, result: output.PplText) -> Fault | None:
    """What is wrong with the numbers, if anything."""
    tokens = output.corpus_tokens_if_short(text)
    if tokens is not None:
        return "short-corpus", (
            f"{cell.corpus} has only {tokens} tokens, a context of {cell.ctx} needs {2 * cell.ctx}"
        )
    for number, value in enumerate(result.running, start=1):
        if not finite(value):
            return "nan", f"perplexity is {value} from chunk {number} on"
    if result.ppl is None:
        return "no-result", output.last_error(text) or "it ended without a final estimate"
    if not finite(result.ppl) or not finite(result.ppl_err):
        return "nan", f"the final estimate is {result.ppl} ± {result.ppl_err}"
    if result.kld is not None:
        odd = [name for name, value in result.kld if value is not None and not finite(value)]
        if odd:
            return "nan", f"KL statistics are not finite: {', '.join(odd)}"
    if result.chunks is not None and result.chunks < cell.chunks:
        return "short-corpus", f"{cell.corpus} holds {result.chunks} of {cell.chunks} chunks"
    if len(result.running) != cell.chunks:
        return "no-result", f"{len(result.running)} of {cell.chunks} chunks were reported"
    return None
