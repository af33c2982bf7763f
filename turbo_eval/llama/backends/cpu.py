"""The CPU: whatever llama.cpp is built with, it can do this."""

from __future__ import annotations

from turbo_eval.llama.backends.base import Backend


class Cpu(Backend):
    name = "cpu"
    title = "CPU"
    registries = ("CPU",)
    repeats = True
