"""llama-kv-eval, run for real: its figures are llama-perplexity's, its file is read, its refusals say why."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import absent
from tests.support.layouts import LAYOUTS, write_model
from turbo_eval.errors import IncompleteError, TurboEvalError
from turbo_eval.evidence.kv_eval import KvEval, read_kv_eval
from turbo_eval.inputs.corpora import CorpusFile
from turbo_eval.llama.build import Build
from turbo_eval.llama.output import parse_ppl
from turbo_eval.util.process import child_environment

pytestmark = pytest.mark.build

PAIRS = ("f16:f16", "q8_0:q8_0", "q4_0:q4_0", "turbo4:turbo4", "turbo3:turbo3", "q8_0:turbo4", "q8_0:turbo3")
CTX, CHUNKS, DECODED = 128, 5, 2
# Batches of four chunks in ubatches of 32 tokens of each; the fifth chunk is alone in its batch.
SIZES = ("-c", str(CTX), "-b", str(4 * CTX), "-ub", str(CTX))
RUN = ("-fa", "on", "-t", "1", "--device", "none", "--no-warmup", "-fit", "off")


def run(build: Build, tool: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    env, _ = child_environment()
    return subprocess.run(
        [build.tool(tool), *map(str, args), *RUN], capture_output=True, text=True, env=env, timeout=600
    )


@pytest.fixture(scope="module", autouse=True)
def _tool(build: Build) -> None:
    try:
        build.tool("llama-kv-eval")
    except TurboEvalError as error:
        absent(error)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a K bias, so that the anchor has something to do."""
    return write_model(LAYOUTS["qwen2"], tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def text(prose: CorpusFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(prose.path.read_bytes()[: 7 * CTX])
    return path


@pytest.fixture(scope="module")
def evaluated(build: Build, model: Path, text: Path) -> KvEval:
    out = text.with_name("figures.bin")
    pairs = [word for pair in (*PAIRS, "q4_0:q4_0,anchor=off") for word in ("--pair", pair)]
    done = run(
        build,
        "llama-kv-eval",
        *("-m", model, "-f", text, "--out", out),
        *(*SIZES, "--chunks", str(CHUNKS), "--one-token", str(DECODED), *pairs),
    )
    assert done.returncode == 0, done.stderr
    return read_kv_eval(out)


@pytest.fixture(scope="module")
def base(build: Build, model: Path, text: Path) -> Path:
    """What --kl-divergence compares with."""
    path = text.with_name("base.dat")
    options = ("--chunks", str(CHUNKS), "--kv-anchor", "off", "--kl-divergence-base", path)
    done = run(build, "llama-perplexity", "-m", model, "-f", text, *SIZES, *options)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("number", range(len(PAIRS) + 1))
def test_figures_are_those_of_llama_perplexity(
    build: Build, model: Path, text: Path, base: Path, evaluated: KvEval, number: int
) -> None:
    state = evaluated.runs[number + 1]
    figures = evaluated.figures(number + 1)
    assert figures.nll.shape == (CHUNKS, CTX - 1 - CTX // 2)
    types = ("-ctk", state.type_k, "-ctv", state.type_v, "--kv-anchor", state.anchor)
    done = run(
        build,
        "llama-perplexity",
        *("-m", model, "-f", text, *SIZES, "--chunks", str(CHUNKS), *types),
        *("--kl-divergence", "--kl-divergence-base", base),
    )
    printed = parse_ppl(done.stdout + done.stderr)
    assert printed.kld is not None, done.stderr
    ppl = np.exp(figures.nll.astype(np.float64).mean())
    assert printed.running[-1] == pytest.approx(ppl, rel=1e-6)
    assert printed.kld.mean == pytest.approx(figures.kld.astype(np.float64).mean(), abs=1e-5)
    rms = 100 * np.sqrt((figures.dp.astype(np.float64) ** 2).mean())
    assert printed.kld.rms_dp_pct == pytest.approx(rms, abs=2e-3)
    same = 100 * (figures.top == evaluated.figures(0).top).mean()
    assert printed.kld.same_top_pct == pytest.approx(same, abs=100 * 1.5 / figures.top.size), "but for a tie"


@pytest.mark.parametrize("number", [1, 5])
def test_one_token_at_a_time(build: Build, model: Path, text: Path, evaluated: KvEval, number: int) -> None:
    state = evaluated.runs[number]
    figures = evaluated.figures(number, "one-token")
    assert figures.chunks == tuple(range(DECODED))
    sizes = ("-c", str(CTX), "-b", str(CTX), "-ub", "1", "--chunks", str(DECODED))
    types = ("-ctk", state.type_k, "-ctv", state.type_v, "--kv-anchor", state.anchor)
    done = run(build, "llama-perplexity", "-m", model, "-f", text, *sizes, *types)
    printed = parse_ppl(done.stdout + done.stderr)
    # there the first half goes through one token at a time, too, which rounds otherwise
    assert printed.ppl == pytest.approx(np.exp(figures.nll.astype(np.float64).mean()), rel=2e-3)


def test_one_token_goes_on_from_the_cache_that_the_batches_wrote(evaluated: KvEval) -> None:
    """Restored whole, it gives what the batches gave, but for rounding: far less than what q4_0 does."""
    exact, batched = evaluated.figures(1), evaluated.figures(3)
    single = evaluated.figures(3, "one-token")
    assert evaluated.runs[3].spec == "q4_0:q4_0"
    rounding = np.abs(batched.nll[:DECODED] - single.nll).mean()
    assert rounding < 0.3 * np.abs(batched.nll[:DECODED] - exact.nll[:DECODED]).mean()


def test_a_second_context_of_f16_gives_the_same_bits(evaluated: KvEval) -> None:
    """On a CPU: so sweep does not measure it."""
    assert evaluated.runs[1].spec == "f16:f16"
    assert not evaluated.figures(1).kld.any() and not evaluated.figures(1, "one-token").kld.any()


def test_a_damaged_file_is_refused(evaluated: KvEval, text: Path, tmp_path: Path) -> None:
    whole = text.with_name("figures.bin").read_bytes()
    damaged = tmp_path / "damaged.bin"

    def said(content: bytes) -> str:
        damaged.write_bytes(content)
        with pytest.raises(IncompleteError) as error:
            read_kv_eval(damaged)
        return error.value.sentence()

    assert "is no file of llama-kv-eval; run" in said(b"GGUF" + whole)
    assert "is no file of llama-kv-eval" in said(b"")
    assert "has version 2, this turbo-eval reads 1" in said(whole[:8] + b"\2" + whole[9:])
    assert "stops after its first bytes" in said(whole[:10])
    assert "has no header" in said(whole[:12])
    # cut anywhere: inside a record, or between two of them
    ends = [len(whole) - 1, len(whole) - 300, len(whole) // 2, 2000, 16]
    assert all("is cut off" in said(whole[:end]) or "has no end" in said(whole[:end]) for end in ends)
    (size,) = struct.unpack_from("<I", whole, 16)
    header = 20 + size
    (block,) = struct.unpack_from("<I", whole, header + 4)
    first = whole[header : header + 8 + block]
    rest = whole[header + len(first) :]
    assert "has 4 of 5 chunks of f16:f16" in said(whole[:header] + rest)
    assert "holds chunk 0 of run 0 twice" in said(whole[:header] + first + first + rest)
    assert "is damaged at n_ctx" in said(whole.replace(b'"n_ctx":128', b'"n_ctx":"x"'))
    assert "which its header does not know" in said(whole[: header + 8] + b"\7" + whole[header + 9 :])
    assert "cannot be read" in _missing(tmp_path)


def _missing(folder: Path) -> str:
    with pytest.raises(IncompleteError) as error:
        read_kv_eval(folder / "nothing")
    return error.value.sentence()


def test_what_ran_is_in_the_header(evaluated: KvEval) -> None:
    reference, q4, q4_off = evaluated.runs[0], evaluated.runs[3], evaluated.runs[-1]
    assert reference.spec.startswith("f16:f16,anchor=off")
    assert (reference.layers_k, reference.layers_anchored, reference.rot_k) == ({"f16": 4}, 0, 0)
    assert q4.layers_v == {"q4_0": 4} and q4.layers_anchored == 4 and q4.rot_v > 0
    assert q4_off.layers_anchored == 0
    assert all(run.n_flash_attn == 4 and run.buffers == ("CPU",) for run in evaluated.runs)
    assert evaluated.header.add_bos and evaluated.header.n_seq == 4


def test_a_cache_like_the_reference_differs_in_nothing(evaluated: KvEval) -> None:
    same = evaluated.figures(1)
    assert not same.kld.any() and not same.dp.any()
    assert (same.nll == evaluated.figures(0).nll).all()
    assert (same.rank >= 1).all() and ((same.rank == 1) == (same.top == same.token)).all()


def test_chunks_may_be_added_later(
    build: Build, model: Path, text: Path, tmp_path: Path, evaluated: KvEval
) -> None:
    out = tmp_path / "more.bin"
    options = ("--first-chunk", "4", "--chunks", "1", "--pair", "q8_0:turbo3", "--out", out)
    assert run(build, "llama-kv-eval", "-m", model, "-f", text, *SIZES, *options).returncode == 0
    more = read_kv_eval(out).figures(1)
    assert more.chunks == (4,)
    assert more.nll[0] == pytest.approx(evaluated.figures(7).nll[4], abs=1e-5)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--pair", "q9_9:f16"), 1, "Unsupported cache type: q9_9"),
        (("--pair", "q8_0"), 1, "K:V is expected"),
        (("--pair", "q8_0:q8_0,anchr=on"), 1, "'anchr"),
        ((), 1, "give at least one --pair"),
        (("--pair", "f16:f16", "--chunks", "50"), 1, "50 chunk(s) of 128 from chunk 0 on need 6400"),
        (("--pair", "f16:f16", "--first-chunk", "50"), 1, "1 chunk(s) of 128 from chunk 50 on"),
        (("--pair", "f16:f16", "--one-token", "x"), 1, "--one-token x: a whole number"),
        (("--pair", "f16:f16", "--chunks", "1", "--out", "/nowhere/at/all"), 1, "cannot write to /nowhere"),
    ],
)
def test_what_cannot_work_is_said(
    build: Build, model: Path, text: Path, tmp_path: Path, args: tuple[str, ...], code: int, says: str
) -> None:
    out = [] if "--out" in args else ["--out", str(tmp_path / "out.bin")]
    done = run(build, "llama-kv-eval", "-m", model, "-f", text, *SIZES, *args, *out)
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_too_little_memory_is_said_before_it_is_taken(build: Build, model: Path, tmp_path: Path) -> None:
    """Each of 401 contexts needs a mask of 40,000 x 40,000 entries of two bytes: 1.2 TiB in all."""
    long, out = tmp_path / "long", tmp_path / "out.bin"
    long.write_bytes(b"x" * 40_000)
    sizes = ("-c", "40000", "-b", "40000", "-ub", "40000", "--chunks", "1")
    pairs = ("--pair", "f16:f16") * 400
    done = run(build, "llama-kv-eval", "-m", model, "-f", long, *sizes, *pairs, "--out", out)
    assert done.returncode == 2, done.stderr
    assert "401 contexts of 40000 tokens need" in done.stderr and "of memory on the host" in done.stderr
    assert not out.exists()


def test_a_refused_pair_ends_alone(build: Build, text: Path, tmp_path: Path) -> None:
    """Without flash attention a quantized V is refused; the f16 pair beside it is not."""
    model = write_model(LAYOUTS["llama"], tmp_path / "model.gguf")
    out = tmp_path / "out.bin"
    env, _ = child_environment()
    command = [build.tool("llama-kv-eval"), "-m", model, "-f", text, *SIZES, "--chunks", "1", "-fa", "off"]
    command += ["-t", "1", "--device", "none", "--pair", "q8_0:q8_0", "--pair", "q8_0:f16", "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 3, done.stderr
    found = read_kv_eval(out)
    assert [run.status for run in found.runs] == ["ok", "refused", "ok"]
    assert "flash" in found.runs[1].detail.lower()
    assert found.figures(2).nll.size and found.runs[2].n_flash_attn == 0
    with pytest.raises(IncompleteError, match="q8_0:q8_0 has no figures: refused"):
        found.figures(1)


def test_what_is_not_finite_is_never_averaged(build: Build, text: Path, tmp_path: Path) -> None:
    """A NaN in a weight: the reference is not finite, so that nothing can be compared."""
    import gguf

    model = write_model(LAYOUTS["llama"], tmp_path / "model.gguf")
    reader = gguf.GGUFReader(model, "r+")
    (weight,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_v.weight")
    weight.data.reshape(-1)[0] = np.nan
    reader.data.flush()
    out = tmp_path / "out.bin"
    options = ("--chunks", "1", "--pair", "q8_0:q8_0", "--out", out)
    done = run(build, "llama-kv-eval", "-m", model, "-f", text, *SIZES, *options)
    assert done.returncode == 4
    assert "is not finite, nothing can be compared with it" in done.stderr
    with pytest.raises(IncompleteError, match="has no end"):
        read_kv_eval(out)
