"""What the commands print, pinned: `python -m tests.support.golden` writes tests/data/golden anew.

The commands run on records that are made up, so nothing is measured: the llama-perplexity here is asked for
its version and its cache types and would refuse anything else.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.records import make_cell, make_kld, make_record
from turbo_eval.cli import main
from turbo_eval.inputs.corpora import resolve_corpus
from turbo_eval.inputs.models import resolve_model
from turbo_eval.llama.build import Build
from turbo_eval.llama.provenance import machine
from turbo_eval.records.record import Decode, Record
from turbo_eval.records.store import Store

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

TOOL = """#!/bin/sh
case "$1" in
--version) echo "version: 1 (0c1e570)"; echo "built with cc 12 for x86_64-linux-gnu" ;;
--help)
    echo "-ctk, --cache-type-k TYPE  KV cache data type for K"
    echo "   allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1, turbo3, turbo4"
    echo "   (default: f16)"
    echo "--kv-anchor MODE" ;;
*) exit 1 ;;
esac
"""

PAIRS = ("f16:f16", "q8_0:q8_0", "q8_0:turbo3", "turbo4:turbo4", "turbo3:turbo3", "q4_0:q4_0")
PPL = dict(zip(PAIRS, (10.0, 10.02, 10.2, 10.4, 3556.0, 10.9), strict=True))
KLD = dict(zip(PAIRS, (1e-6, 0.004, 0.012, 0.02, 2.5, 0.05), strict=True))

GATE = """
[sweep]
model = "{model}"
corpus = "{corpus}"
chunks = 4
threads = 2
pairs = {pairs}

[[check]]
pair = "q8_0:*"
{bounds}
"""


class World:
    """A folder with a model, a text, a tool and three results folders: whole, failed and none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        tool = self.bin / "llama-perplexity"
        tool.write_text(TOOL)
        tool.chmod(0o755)
        self.model, self.corpus = folder / "tiny.gguf", folder / "prose.txt"
        write_gguf(self.model)
        self.corpus.write_text("The cache holds keys and values. " * 200)
        self.whole, self.failed = folder / "whole", folder / "failed"
        (folder / "none").mkdir()
        for record in self.records():
            Store(self.whole, machine().id).write(record)
        shared = self.shared()
        for record in (
            make_record("f16:f16", 10.0, **shared),
            make_record("q4_0:q4_0", status="crash", detail="killed by SIGSEGV", **shared),
        ):
            Store(self.failed, machine().id).write(record)

    def cell(self) -> dict[str, Any]:
        model, corpus = resolve_model(str(self.model)), resolve_corpus(str(self.corpus))
        return {
            "model": model.name,
            "model_sha256": model.sha256,
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
            "tree": Build.from_bin_dir(self.bin).tree,
            "anchor": "auto",
        }

    def shared(self) -> dict[str, Any]:
        return {**self.cell(), "machine": machine()}

    def records(self) -> Iterator[Record]:
        """Perplexity of each pair, KL divergence, and one decode cell."""
        shared = self.shared()
        for pair in PAIRS:
            yield make_record(pair, PPL[pair], **shared)
            yield make_record(pair, PPL[pair], kld=make_kld(KLD[pair]), **shared)
        batched = make_cell("q8_0:q8_0", **self.cell())
        options = {"batched_ubatch": 512, "batched_chunks": 4, "bound_pct": 2.0}
        yield make_record(
            "q8_0:q8_0",
            10.03,
            decode=Decode(ppl_batched=10.02, delta_pct=0.1, bound_pct=2.0, batched_key=batched.key()),
            metric="decode",
            ubatch=1,
            chunks=2,
            options=options,
            **shared,
        )

    def gate(self, name: str, bounds: str, pairs: tuple[str, ...] = PAIRS) -> str:
        path = self.folder / f"{name}.toml"
        path.write_text(GATE.format(model=self.model, corpus=self.corpus, pairs=list(pairs), bounds=bounds))
        return str(path)

    def key(self, pair: str, metric: str) -> str:
        return make_cell(pair, **{**self.cell(), "metric": metric}).key()

    def commands(self) -> dict[str, list[str]]:
        """Name of the golden file: arguments."""
        whole, failed, none = str(self.whole), str(self.failed), str(self.folder / "none")
        tools = ["--bin-dir", str(self.bin)]
        what = ["--model", str(self.model), "--corpus", str(self.corpus), "--pairs", ",".join(PAIRS)]
        what += ["--chunks", "4", "--threads", "2", *tools]
        passing = "max_delta_pct = 3\nmax_ppl = 11"
        commands = {
            "plan": ["plan", *what, "--metrics", "kld,decode", "--results", whole],
            "plan-nothing-on-record": ["plan", *what, "--results", none],
            "sweep-json": ["sweep", *what, "--json", "--results", whole],
            "sweep-kld": ["sweep", *what, "--metrics", "kld", "--results", whole],
            "sweep-nothing": ["sweep", "--results", whole],
            "sweep-unknown-type": ["sweep", "--pairs", "f16:f17", *tools, "--results", whole],
            "gate-pass": ["gate", self.gate("pass", passing), *tools, "--results", whole],
            "gate-regression": [
                *("gate", self.gate("regression", "max_delta_pct = 1"), *tools, "--results", whole),
                *("--markdown", str(self.folder / "verdict.md")),
            ],
            "gate-failed": ["gate", self.gate("failed", passing), *tools, "--results", failed],
            "gate-incomplete": ["gate", self.gate("incomplete", passing), *tools, "--results", none],
            "gate-bad-key": ["gate", self.gate("bad", "max_pll = 1"), *tools, "--results", whole],
            "show-ppl": ["show", self.key("q8_0:turbo3", "ppl"), "--results", whole],
            "show-kld": ["show", self.key("q8_0:turbo3", "kld"), "--results", whole],
            "show-unknown": ["show", "zzzz", "--results", whole],
            "results-list": ["results", "list", "--results", failed],
            "report": ["report", whole, failed, "--markdown"],
            "table-nothing": ["table", none],
            "table-failed": ["table", failed],
            "table-baseline": ["table", whole, "--baseline", "q8_0:q8_0"],
        }
        for form in ("rich", "markdown", "csv", "json"):
            commands[f"table-{form}"] = ["table", whole, "--format", form]
        for figure in ("ppl", "delta", "kld"):
            commands[f"table-matrix-{figure}"] = ["table", whole, "--matrix", figure]
        return commands

    def run(self, arguments: list[str]) -> str:
        """Exit code, stdout and stderr, without what another machine or minute would change."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                _main(arguments)
            except SystemExit as done:
                code = int(done.code or 0)
        text = f"exit code {code}\n\n{out.getvalue()}"
        if err.getvalue():
            text += f"\n---- stderr\n{err.getvalue()}"
        verdict = self.folder / "verdict.md"
        if verdict.is_file():
            text += f"\n---- verdict.md\n{verdict.read_text()}"
            verdict.unlink()
        # longest first: the folder may lie in the temporary folder, the tool in the folder
        text = text.replace(str(self.folder), "FOLDER").replace(machine().id, "MACHINE")
        text = re.sub(r"\d+\.\d s (in llama|here)", r"N s \1", text)
        for value, name in ((machine().cpu, "CPU"), (machine().os, "OS")):
            text = text.replace(value, name)
        text = re.sub(r"(provenance\.machine\.\w+ +).*", r"\1…", text)
        return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def keys() -> str:
    """Keys and file names of cells: a changed one would orphan every record that people have."""
    cells = [
        make_cell(),
        make_cell("q8_0:turbo3"),
        make_cell("q8_0:turbo3", metric="kld"),
        make_cell("q8_0:turbo3", model="other/name.gguf", corpus="renamed"),
        make_cell("q8_0:turbo3", anchor="auto"),
        make_cell("q8_0:turbo3", anchor="a.gguf", anchor_sha256="3" * 64),
        make_cell("q8_0:turbo3", env={"GGML_FOO": "1"}),
        make_cell("q8_0:turbo3", backend="cuda", ubatch=128, batch=2048, ctx=2048, flash_attn=False),
        make_cell("q8_0:turbo3", metric="decode", options={"batched_ubatch": 512, "batched_chunks": 4}),
    ]
    store = Store(Path("results"), "machine")
    lines = []
    for cell in cells:
        lines.append(f"{store.path(cell)}  log {store.log_path(cell)}")
        lines.append(f"  {cell.key()} {cell.key_any_tree()} {cell.comparison_key()} {cell.text_key()}")
    return "\n".join(lines) + "\n"


def write_gguf(path: Path) -> None:
    """A header that describes a small model, and no weights."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {
        "block_count": 30,
        "embedding_length": 576,
        "attention.head_count": 9,
        "attention.head_count_kv": 3,
        "context_length": 8192,
        "vocab_size": 49152,
    }
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"llama.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The world in a temporary folder, the environment set so that the output is the same everywhere."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        for name in [n for n in os.environ if n.startswith(("GGML_", "LLAMA_", "TURBO_EVAL_"))]:
            del os.environ[name]
        os.environ |= {"COLUMNS": "200", "TURBO_EVAL_CACHE": f"{folder}/cache", "NO_COLOR": "1"}
        try:
            yield World(Path(folder) / "world")
        finally:
            os.environ.clear()
            os.environ.update(before)


def _main(arguments: list[str]) -> None:
    before = sys.argv
    sys.argv = ["turbo-eval", *arguments]
    try:
        main()
    finally:
        sys.argv = before


def every() -> dict[str, str]:
    """Name and content of each golden file."""
    with world() as made:
        found = {name: made.run(arguments) for name, arguments in made.commands().items()}
    return {**found, "keys": keys()}


if __name__ == "__main__":
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for name, text in every().items():
        (GOLDEN / f"{name}.txt").write_text(text, encoding="utf-8")
