"""A calibration file for --kv-anchor: statistics of Q and K on a text, and where they come from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from turbo_eval import __version__
from turbo_eval.errors import EnvironmentProblem, UsageError
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.inputs.models import ModelFile
from turbo_eval.llama.backends import backend
from turbo_eval.llama.build import Build
from turbo_eval.util.files import file_sha256, writing
from turbo_eval.util.process import child_environment, run

TOOL = "llama-kv-calibrate"


@dataclass(frozen=True)
class Calibration:
    """A written file: `tokens` were read, `size` in bytes, sha256 in hex."""

    path: Path
    sha256: str
    size: int
    tokens: int


def calibrate(
    model: ModelFile,
    corpus: CorpusFile,
    build: Build,
    out: Path,
    *,
    ctx: int = 512,
    chunks: int = 16,
    threads: int | None = None,
) -> Calibration:
    """Run the model over `chunks` × `ctx` tokens of the corpus and write `out` (GGUF).

    Per layer it holds k_mean, k_std and q_rms, half precision [n_embd_head_k, n_head_kv], before
    RoPE; llama.cpp makes the anchor and the balance for its own context from them. The names and
    sha256 of model and corpus, the patched tree and this program's version go in as kv_anchor.*.

    Raises:
        UsageError: the text is shorter than one context, or the model has nothing to calibrate.
        EnvironmentProblem: no llama-kv-calibrate in the build, or it failed.
    """
    if chunks < 1 or ctx < 32:
        raise UsageError(f"{chunks} chunks of {ctx} tokens are no text", "ask for at least 1 chunk of 32")
    argv = [str(build.tool(TOOL)), "-m", str(model.path), "-f", str(corpus.path), "-o", str(out)]
    argv += ["-c", str(ctx), "--chunks", str(chunks)]
    argv += backend(build.backend).device_flags()
    if threads:
        argv += ["-t", str(threads)]
    provenance = {
        "model.file": model.path.name,
        "model.sha256": model.sha256,
        "corpus.name": corpus.name,
        "corpus.sha256": corpus.sha256,
        "llama.tree": build.tree,
        "llama.pin": build.pin,
        "generator": f"turbo-eval {__version__}",
    }
    for key, value in provenance.items():
        argv += ["--meta", f"{key}={value}"]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    env, _ = child_environment()
    outcome = run(argv, log=log, env=env)
    if outcome.returncode != 0 or not out.is_file():
        errors = [line for line in outcome.text.splitlines() if " E " in line or "kv-calibrate" in line]
        reason = errors[-1].split(" E ")[-1].strip() if errors else f"exit code {outcome.returncode}"
        kind = UsageError if "tokens, at least" in outcome.text else EnvironmentProblem
        raise kind(f"{TOOL} failed on {model.name}: {reason}", f"read {log}")
    log.unlink(missing_ok=True)
    said = re.search(r"(\d+) tokens -> ", outcome.text)
    return Calibration(out, file_sha256(out), out.stat().st_size, int(said[1]) if said else 0)
