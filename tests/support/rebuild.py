"""A build's CPU backend with one source file changed, without touching the build: the file is compiled
and the library linked with the build's own commands, into a copy of its binaries."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

TOOLS = ("llama-perplexity", "llama-kv-eval")


def rebuilt_cpu_backend(bin_dir: Path, source: str, change: dict[str, str], folder: Path) -> Path:
    """Copy `bin_dir` to `folder`, with `change` (old text to new, each found once) in ggml-cpu/`source`."""
    build = bin_dir.parent
    entries = json.loads((build / "compile_commands.json").read_text())
    entry = next(e for e in entries if e["file"].endswith(f"/ggml-cpu/{source}"))
    original = Path(entry["file"])
    text = original.read_text()
    for old, new in change.items():
        assert text.count(old) == 1, f"{old!r} is not once in {original.name}"
        text = text.replace(old, new)
    folder.mkdir()
    changed, obj = folder / source, folder / "changed.o"
    changed.write_text(text)
    compiled = shlex.split(entry["command"])
    built = compiled[compiled.index("-o") + 1]
    compiled[compiled.index("-o") + 1] = str(obj)
    compiled[compiled.index(entry["file"])] = str(changed)
    _run([*compiled, "-I", str(original.parent)], Path(entry["directory"]))

    for file in bin_dir.iterdir():
        if file.is_symlink() or ".so" in file.name or file.name in TOOLS:
            shutil.copy(file, folder / file.name, follow_symlinks=False)
    library = next(f for f in folder.glob("libggml-cpu.so.*") if not f.is_symlink())
    said = _run(["ninja", "-t", "commands", "-s", f"bin/{library.name}"], build)
    link = shlex.split(said.strip().removeprefix(":").strip().removeprefix("&&").removesuffix("&& :"))
    link[link.index("-o") + 1] = str(library)
    link[link.index(built)] = str(obj)
    _run(link, build)
    return folder


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
