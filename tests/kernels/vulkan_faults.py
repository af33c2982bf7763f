"""Faults planted in the Vulkan shaders, each of which test-backend-ops has to catch on llvmpipe.

`python -m tests.kernels.vulkan_faults` prints a line a fault and exits 1 when one is missed. Only the
shaders that a fault touches are compiled anew, and libggml-vulkan is linked again in a folder of its own: the
build stays as it is.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.kernels import vulkan_ops
from turbo_eval.llama.build import find_build
from turbo_eval.util import paths

_SHADERS = "ggml/src/ggml-vulkan/vulkan-shaders"
_ATTENTION = "flash_attn.comp"
_REDUCE = "flash_attn_split_k_reduce.comp"
_ROPE_ROT = "rope_rot_store.comp"

RUNS = 20  # at most, until a fault shows


@dataclass(frozen=True)
class Fault:
    """One change of a shader.

    Attributes:
        name: what is wrong with it.
        file: where it is planted.
        old, new: the text that is replaced, found exactly once.
        compiled: the .comp files to compile again.
        op, params: the cases of test-backend-ops that see it.
        quick: is it one of those that `make test` plants?
    """

    name: str
    file: str
    old: str
    new: str
    compiled: tuple[str, ...]
    op: str
    params: str
    quick: bool = False


# One case each, so that llvmpipe compiles one pipeline a fault. With 3 sequences, 2 heads and 1025 keys KV is
# split, and the results are merged with the sinks, between -10 and 10. 113 keys leave a tile half empty.
_MERGED = r"hsk=64,hsv=64,nh=2,nr23=\[1,3\],kv=1025,nb=1,mask=1,sinks=1,.*type_K=turbo3,type_V=turbo3"
_TAIL = r"hsk=64,hsv=64,nh=4,nr23=\[1,1\],kv=113,nb=35,mask=1,sinks=0,.*type_K=turbo3,type_V=turbo3"
_DIRECT = r"hsk=64,hsv=64,nh=1,nr23=\[24,1\],kv=1000,nb=3,mask=1,sinks=1,.*type_K=turbo3,type_V=turbo3"
# All 12 rows of the cache and of the window are compared, 5 of them are written.
_WRITES = r"type=turbo3,n=64,n_head=3,n_tokens=5,mode=2,.*consts=3,.*type_win=q8_0"
_WINDOW = "win=145,type_win=f16,type_K=turbo3,type_V=turbo3,hsk=64"
_ATTN = "type_K=turbo3,type_V=turbo3,hs=64,n_head_kv=2,gqa_ratio=4,kv=256,n_tokens=1,mode=2$"
FAULTS = (
    Fault(
        "wrong plane: turbo3's signs are those of the next values",
        "turbo.glsl",
        "s << (7 - (4*(k/2) + k%2))",
        "s << (7 - (4*(k/2) + (k + 1)%2))",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _TAIL,
    ),
    Fault(
        "wrong plane in the encoder: turbo3's signs are packed in another order",
        "turbo_encode.glsl",
        "(8*j + 4*(k/2) + 2*h + k%2)",
        "(8*j + 4*(k/2) + h + 2*(k%2))",
        ("copy_to_turbo.comp",),
        "SET_ROWS",
        "turbo3",
        quick=True,
    ),
    Fault(
        "wrong scale: both groups of a block take the first one",
        "turbo.glsl",
        "(dd >> (8*(i/32))) & 0xFF",
        "dd & 0xFF",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _TAIL,
    ),
    Fault(
        "wrong codebook: turbo3's third magnitude is 62 in place of 74",
        "turbo.glsl",
        "61*(r & TURBO_BYTES) + 21*",
        "49*(r & TURBO_BYTES) + 33*",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _TAIL,
        quick=True,
    ),
    Fault(
        "off-by-one tail: the last key is left out",
        "flash_attn_base.glsl",
        "return !KV_bounds_check || lin < KV;",
        "return !KV_bounds_check || lin + 1 < KV;",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _TAIL,
    ),
    Fault(
        "wrong order: the values of a unit are taken for those of the next eight",
        "flash_attn_dequant.glsl",
        "8 * (u / 2) + u % 2 + 2 * k;",
        "8 * (u / 2) + u % 2 + 2 * (k ^ 1);",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _DIRECT,
    ),
    Fault(
        "mask: all queries of a thread take that of the first",
        _ATTENTION,
        "if (r == 0 || p.gqa_ratio <= 1) {",
        "if (r == 0) {",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _DIRECT,
    ),
    Fault(
        "sink ignored where KV is split",
        _REDUCE,
        "L = L*ms + vs;",
        "",
        (_REDUCE,),
        "FLASH_ATTN_EXT",
        _MERGED,
        quick=True,
    ),
    Fault(
        "sink ignored where KV is not split",
        _ATTENTION,
        "Lf[r] = Lf[r]*ms + vs;",
        "",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _DIRECT,
    ),
    Fault(
        "stream offset: every sequence reads the keys of the first",
        _ATTENTION,
        "k_offset = (ik2*p.nb12 + ik3*p.nb13) / FaBlockBytesK;",
        "k_offset = ik2*p.nb12 / FaBlockBytesK;",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _MERGED,
    ),
    Fault(
        "split-K merge without the maximum",
        _REDUCE,
        "O += exp(m - m_max) * data_a[o_offset];",
        "O += data_a[o_offset];",
        (_REDUCE,),
        "FLASH_ATTN_EXT",
        _MERGED,
    ),
    Fault(
        "exact window in the same dispatch: its keys are left out",
        _ATTENTION,
        "add_keys(true);",
        "",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _WINDOW,
    ),
    Fault(
        "exact window in the same dispatch: it reads the cache's rows",
        _ATTENTION,
        "FLOAT_TYPEV4(data_kw4[idx])",
        "FLOAT_TYPEV4(data_kv4[idx])",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _WINDOW,
    ),
    Fault(
        "exact window in the same dispatch: every part begins with its first key",
        "flash_attn_base.glsl",
        "start_j = split_win * WIN_SPLIT / Bc;",
        "start_j = 0;",
        (_ATTENTION,),
        "FLASH_ATTN_EXT",
        _WINDOW,
    ),
    Fault(
        "rotation of the merged result without its first stage",
        _REDUCE,
        "for (uint h = 1; h < BLOCK_SIZE; h *= 2)",
        "for (uint h = 2; h < BLOCK_SIZE; h *= 2)",
        (_REDUCE,),
        "FLASH_ATTN_EXT_HADAMARD",
        r"hsk=64,hsv=64,.*kv=1024,nb=1,.*type_K=q8_0,type_V=turbo3",
    ),
    Fault(
        "RoPE, rotation and write: the rotation is not scaled",
        _ROPE_ROT,
        "v *= pc.scale;",
        "",
        (_ROPE_ROT,),
        "ATTN_HADAMARD",
        _ATTN,
        quick=True,
    ),
    Fault(
        "RoPE, rotation and write: the last stage of the rotation left out",
        _ROPE_ROT,
        "h < pc.n_rot; h <<= 1",
        "2*h < pc.n_rot; h <<= 1",
        (_ROPE_ROT,),
        "ATTN_HADAMARD",
        _ATTN,
    ),
    Fault(
        "RoPE, rotation and write: another row of the cache",
        _ROPE_ROT,
        "rope_data_i[i2].x*pc.d_stride",
        "(rope_data_i[i2].x ^ 1)*pc.d_stride",
        (_ROPE_ROT,),
        "ROPE_HADAMARD",
        _WRITES,
    ),
    Fault(
        "RoPE, rotation and write: another row of the exact window",
        _ROPE_ROT,
        "data_wi[i2].x*pc.w_stride + (i1*n_head_size + i0 + tid)/32",
        "(data_wi[i2].x ^ 1)*pc.w_stride + (i1*n_head_size + i0 + tid)/32",
        (_ROPE_ROT,),
        "ROPE_HADAMARD",
        _WRITES,
    ),
    Fault(
        "RoPE, rotation and write: every other block of the exact window keeps its scale",
        _ROPE_ROT,
        "if (tid % 32 == 0) {\n            data_w_q8_0",
        "if (tid == 0) {\n            data_w_q8_0",
        (_ROPE_ROT,),
        "ROPE_HADAMARD",
        _WRITES,
    ),
    Fault(
        "RoPE, rotation and write: the K anchor is not added",
        _ROPE_ROT,
        "v += data_add[c_idx + i];",
        "",
        (_ROPE_ROT,),
        "ROPE_HADAMARD",
        _WRITES,
    ),
    Fault(
        "RoPE, rotation and write: all heads are balanced with the factors of the first",
        _ROPE_ROT,
        "v *= data_mul[c_idx + i];",
        "v *= data_mul[i];",
        (_ROPE_ROT,),
        "ROPE_HADAMARD",
        _WRITES,
    ),
)


def shader_text(fault: Fault) -> str:
    """The shader that the fault is planted in, as it is."""
    return (paths.worktree_dir() / _SHADERS / fault.file).read_text()


def plant(fault: Fault, folder: Path) -> None:
    """Put a libggml-vulkan with the fault into `folder`."""
    build = paths.build_dir("vulkan")
    shaders = folder / "vulkan-shaders"
    shutil.copytree(paths.worktree_dir() / _SHADERS, shaders)
    text = shader_text(fault)
    assert text.count(fault.old) == 1, f"{fault.file} holds {fault.old!r} {text.count(fault.old)} times"
    (shaders / fault.file).write_text(text.replace(fault.old, fault.new))

    commands = _run(["ninja", "-C", str(build), "-t", "commands", "ggml-vulkan"], build).splitlines()
    link = next(line for line in reversed(commands) if "-shared" in line and "libggml-vulkan.so" in line)
    for comp in fault.compiled:
        source, made = folder / f"{comp}.cpp", folder / f"{comp}.o"
        generate = next(line for line in commands if f"vulkan-shaders/{comp} " in line and "--source" in line)
        generate = re.sub(r"--source\s+\S+", f"--source {shaders / comp}", generate)
        generate = re.sub(r"--output-dir\s+\S+", f"--output-dir {folder / 'spv'}", generate)
        generate = re.sub(r"--target-cpp\s+\S+", f"--target-cpp {source}", generate)
        _run(["sh", "-c", generate], build)
        compiled = next(line for line in commands if f"{comp}.cpp.o -c " in line)
        old = next(word for word in shlex.split(compiled) if word.endswith(f"{comp}.cpp.o"))
        compiled = re.sub(r"-MF \S+", f"-MF {made}.d", compiled)
        compiled = re.sub(r"-c \S+", f"-c {source}", compiled.replace(f"-o {old}", f"-o {made}"))
        _run(["sh", "-c", compiled], build)
        link = link.replace(f" {old} ", f" {made} ")
        assert str(made) in link, link
    # the library's own name stays, so that it is loaded in place of the build's
    _run(["sh", "-c", re.sub(r"-o (\S*?)(libggml-vulkan\.so)[.\d]*", rf"-o {folder}/\2.0", link)], build)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)[:2000]}\n{done.stdout}{done.stderr}"
    return done.stdout


def caught(fault: Fault) -> tuple[int, int]:
    """(failed, cases) with the fault in place, of the first run that fails, else of the last.

    Inputs are random: a sink shows in half of the runs, where it is larger than what it is compared with.
    """
    with tempfile.TemporaryDirectory() as name:
        plant(fault, Path(name))
        for _ in range(RUNS):
            passed, total, _ = vulkan_ops.run(fault.op, fault.params, library=Path(name))
            if passed < total:
                break
    return total - passed, total


def main() -> int:
    find_build("vulkan")
    missed = 0
    for fault in FAULTS:
        passed, total, _ = vulkan_ops.run(fault.op, fault.params)
        failed, _ = caught(fault)
        sound = 0 < passed == total and failed > 0
        missed += not sound
        word = "caught" if sound else "MISSED"
        print(f"{word}: {fault.name}: {failed} of {total} fail, {total - passed} without it", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
