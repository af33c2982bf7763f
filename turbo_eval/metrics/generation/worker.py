"""Child process: load our llama.cpp through llama-cpp-python, generate greedily, write JSON.

Run as `python -m turbo_eval.metrics.generation.worker JOB.json`; the job names the output file.
A process of its own, so that a crash in a kernel is a status and not the end of the sweep.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbo_eval.llama.libraries import library
from turbo_eval.metrics.generation.puzzles import answered, puzzle

QUESTION = "\n\nThe secret number of the archive is"
NEEDLE = " The secret number of the archive is {number}. "


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    llama = _load(job)
    text = Path(job["corpus"]).read_text(encoding="utf-8", errors="replace")
    # Tokens have 3 to 6 characters: 8 for each that is needed are enough, and quick to tokenize.
    tokens = llama.tokenize(text[: 8 * job["need_tokens"]].encode(), add_bos=False, special=False)
    if len(tokens) < job["need_tokens"]:
        print(f"error: the corpus has {len(tokens)} tokens here, {job['need_tokens']} are needed", flush=True)
        sys.exit(3)
    if job["metric"] == "greedy":
        result: dict[str, Any] = {"outputs": [list(o) for o in _greedy(llama, tokens, job)]}
    elif job["metric"] == "retrieval":
        result = {"solved": list(_retrieval(llama, tokens, job))}
    else:
        result = {"detail": [list(d) for d in _needle(llama, tokens, job)]}
    Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")


def ggml_type(name: str) -> int:
    """The enum value of a cache type in the library that is loaded: values move between versions.

    Raises:
        SystemExit: the library has no such type.
    """
    import llama_cpp  # noqa: PLC0415 loads llama.cpp, which talks

    base = ctypes.CDLL(str(library(Path(llama_cpp.llama_cpp._lib._name).parent, "ggml-base")))
    base.ggml_type_name.restype = ctypes.c_char_p
    for value in range(256):
        if base.ggml_type_name(value) == name.encode():
            return value
    print(f"Unsupported cache type: {name}", flush=True)
    sys.exit(1)


def _load(job: dict[str, Any]) -> Any:
    import llama_cpp  # noqa: PLC0415 loads llama.cpp, which talks

    return llama_cpp.Llama(
        model_path=job["model"],
        n_ctx=job["n_ctx"],
        n_batch=512,
        n_ubatch=512,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        n_gpu_layers=job["gpu_layers"],
        type_k=ggml_type(job["k"]),
        type_v=ggml_type(job["v"]),
        flash_attn=True,
        verbose=True,
    )


def _continue(llama: Any, prompt: list[int], count: int) -> list[int]:
    """`count` tokens, each the most probable one. Stops at an end token, which is kept."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    out: list[int] = []
    for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
        out.append(int(token))
        if len(out) >= count or token == llama.token_eos():
            break
    return out


def _greedy(llama: Any, tokens: list[int], job: dict[str, Any]) -> Iterator[list[int]]:
    options = job["options"]
    length = options["prompt_tokens"]
    for number in range(options["prompts"]):
        start = number * length
        yield _continue(llama, tokens[start : start + length], options["tokens"])
        print(f"greedy {number + 1}/{options['prompts']}", flush=True)


def _needle(llama: Any, tokens: list[int], job: dict[str, Any]) -> Iterator[tuple[int, float, bool]]:
    options = job["options"]
    question = llama.tokenize(QUESTION.encode(), add_bos=False, special=False)
    for length in options["lengths"]:
        for depth in options["depths"]:
            number = str(10000 + int(hashlib.sha256(f"{length} {depth}".encode()).hexdigest(), 16) % 90000)
            planted = llama.tokenize(NEEDLE.format(number=number).encode(), add_bos=False, special=False)
            room = length - len(planted) - len(question)
            at = round(room * depth)
            prompt = tokens[:at] + planted + tokens[at:room] + question
            answer = llama.detokenize(_continue(llama, prompt, 12)).decode("utf-8", "replace")
            hit = number in answer.replace(",", "").replace(" ", "")
            yield length, depth, hit
            print(f"needle {length} at {depth}: {number} {answer!r} {hit}", flush=True)


def _retrieval(llama: Any, tokens: list[int], job: dict[str, Any]) -> Iterator[bool]:
    """Whether each puzzle is solved; what is planted is spread evenly over the text."""

    def spelled(text: str) -> list[int]:
        return list(llama.tokenize(text.encode(), add_bos=False, special=False))

    options = job["options"]
    for kind in options["kinds"]:
        for length in options["lengths"]:
            for number in range(options["puzzles"]):
                made = puzzle(kind, f"{length} {number}", options["several"], length // 2)
                question, planted = spelled(made.question), [spelled(text) for text in made.planted]
                filler = spelled(made.filler) if made.filler else tokens
                room = length - len(question) - sum(map(len, planted))
                prompt, at = [], 0
                for place, piece in enumerate(planted, start=1):
                    prompt += filler[at : room * place // (len(planted) + 1)] + piece
                    at = room * place // (len(planted) + 1)
                prompt += filler[at:room] + question
                said = llama.detokenize(_continue(llama, prompt, made.tokens)).decode("utf-8", "replace")
                hit = answered(made, said)
                yield hit
                print(f"retrieval {kind} {length} #{number}: {made.answers} {said!r} {hit}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
