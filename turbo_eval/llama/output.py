"""llama.cpp's output → numbers. Pure: text in, values out, no judgement.

The formats are those of tools/perplexity/perplexity.cpp, src/llama-kv-cache.cpp and
src/llama-context.cpp at the pin, with log prefixes, timestamps and colours off and verbosity 4.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from turbo_eval.formats.cache_types import CACHE_TYPES
from turbo_eval.records.record import Effective, Kld

_NUM = r"(-?(?:nan|inf|\d+(?:\.\d+)?(?:e[+-]?\d+)?))"

# llama_kv_cache: size = 4.57 MiB (512 cells, 30 layers, 1/1 seqs), K (q8_0): 2.99 MiB, V (q4_0): 1.58 MiB
_KV_SIZE = re.compile(
    r"size\s*=\s*([\d.]+) MiB \(\s*(\d+) cells,\s*(\d+) layers.*?\), "
    # "turbo3+q8_0": the anchor took another type for some layers; `k_bits` is their mean
    r"K \((\w+)(?:\+\w+)*\):\s*([\d.]+) MiB, V \((\w+)\):\s*([\d.]+) MiB"
)
_KV_BUFFER = re.compile(r"^\S*kv_cache\S*:\s+(\S+) KV buffer size\s*=", re.M)
_ROT = re.compile(r"attn_rot_([kv])\s*=\s*(\d)")
_FLASH = re.compile(r"^llama_context: flash_attn\s*=\s*(\w+)", re.M)
_FLASH_AUTO = re.compile(r"Flash Attention was auto, set to (\w+)")
_UBATCH = re.compile(r"^llama_context: n_ubatch\s*=\s*(\d+)", re.M)
_N_CTX_SEQ = re.compile(r"^llama_context: n_ctx_seq\s*=\s*(\d+)", re.M)
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
# graph: nodes = 936, splits = 1, input objects = 4, …
# graph (pp bs=512, tg bs=1): nodes = 1844 / 1544, splits = 87 / 3, … (prompts and single tokens differ)
_SPLITS = re.compile(r"graph[^:\n]*: nodes = .*?, splits = (.*?)(?:, input|$)", re.M)
_DEVICE = re.compile(r"using device (\S+) \((.+?)\)")
# ggml_cuda_init:   Device 0: NVIDIA H100 80GB HBM3, compute capability 9.0, VMM: yes
# ggml_metal_device_init: GPU family: MTLGPUFamilyApple8  (1008)
_GPU = re.compile(r"(?:^|: )\s*(Device \d+: .+?|GPU family: .+?)\s*$", re.M)
# kv_anchor: auto -> on (anchor: 12/28 layers, …, K types: turbo4 x28, 4.250 bits per K value)
_ANCHOR = re.compile(r"^kv_anchor: (?:.* -> )?((?:on|off)\b.*)$", re.M)
_ANCHOR_BITS = re.compile(r"([\d.]+) bits per K value")
# exact window: recent 128, first 4, type q8_0, 144 cells/seq, 0.98 MiB; 3.25 bits per value, 3.41 with …
# llama_kv_cache: exact window: off (not wanted)
_WINDOW = re.compile(
    r"exact window: (?:off|recent (\d+), first (\d+), type (\w+), \d+ cells/seq, ([\d.]+) MiB;"
    r" [\d.]+ bits per value, ([\d.]+) with the window)"
)
# llama_kv_cache: types: 3.250 bits per value, K 3.583 (turbo4:0,3-5 turbo3:1-2), V 2.917 (turbo3)
_TYPES = re.compile(r"types: [\d.]+ bits per value, K ([\d.]+) \((.*?)\), V ([\d.]+) \((.*?)\)")
OF_PROFILE = "profile"  # in place of a type, where the types differ by layer
_CONFIG_FILE = re.compile(r"^using config file: (.+)$", re.M)

_TOTAL = re.compile(r"over (\d+) chunks, n_ctx=(\d+)")
_RUNNING = re.compile(r"\[(\d+)\]" + _NUM + ",")
_KLD_ROW = re.compile(
    r"^\s*(\d+)\s+" + _NUM + r" ±\s+" + _NUM + r"(?:\s+" + _NUM + r" ±\s+" + _NUM + r"\s*%?){4}\s*$", re.M
)
_FINAL = re.compile(r"Final estimate: PPL = " + _NUM + r" \+/- " + _NUM)


@dataclass(frozen=True)
class PplText:
    """What a perplexity or KL-divergence run printed.

    Attributes:
        ppl, ppl_err: the final estimate and its standard error; None where not printed.
        running: perplexity after chunk 1, 2, …
        chunks: how many chunks llama-perplexity said it would compute.
        kld: the statistics of a --kl-divergence run.
    """

    ppl: float | None
    ppl_err: float | None
    running: tuple[float, ...]
    chunks: int | None
    kld: Kld | None


def _more_than(name: str, bits: str) -> bool:
    return name in CACHE_TYPES and float(bits) > 1.01 * CACHE_TYPES[name].bpv


def parse_effective(text: str) -> Effective:
    """What llama.cpp says it runs; fields it did not print are None."""
    caches = _KV_SIZE.findall(text)
    rot = {side: value == "1" for side, value in _ROT.findall(text)}
    flash = _FLASH.search(text)
    flash_auto = _FLASH_AUTO.search(text)
    offloaded = _OFFLOADED.search(text)
    splits = [
        int(n) for s in _SPLITS.findall(text) for n in re.findall(r"(\d+)(?! *\)|\d|\s*\(with)", _plain(s))
    ]
    ubatch = _UBATCH.search(text)
    n_ctx = _N_CTX_SEQ.search(text)
    anchors = _ANCHOR.findall(text)
    bits = _ANCHOR_BITS.findall(anchors[-1]) if anchors else []
    windows = _WINDOW.findall(text)
    window = windows[-1] if windows else ("",) * 5
    window_mib = sum(float(w[3] or 0) for w in windows)
    of_profile = any(c[3] == OF_PROFILE for c in caches)
    said = next(iter(_TYPES.findall(text)), None)
    types = said if of_profile else None
    # heads filled up with zeros take more than their type says
    filled = said is not None and not of_profile and any(_more_than(c[5], said[2]) for c in caches)
    if said is not None and (of_profile or filled):
        bits = [said[0]]
    return Effective(
        k="+".join(dict.fromkeys(c[3] for c in caches)) or None,
        v="+".join(dict.fromkeys(c[5] for c in caches)) or None,
        kv_mib=round(sum(float(c[0]) for c in caches), 2) if caches else None,
        k_mib=round(sum(float(c[4]) for c in caches), 2) if caches else None,
        v_mib=round(sum(float(c[6]) for c in caches), 2) if caches else None,
        kv_layers=sum(int(c[2]) for c in caches) if caches else None,
        kv_devices=tuple(dict.fromkeys(_KV_BUFFER.findall(text))),
        rot_k=rot.get("k"),
        rot_v=rot.get("v"),
        flash_attn=_flash_state(flash, flash_auto),
        anchor=anchors[-1] if anchors else None,
        k_bits=float(bits[-1]) if bits else None,
        v_bits=float(said[2]) if said is not None and (of_profile or filled) else None,
        types_k=types[1] if types else None,
        types_v=types[3] if types else None,
        recent=int(window[0] or 0) if windows else None,
        first=int(window[1] or 0) if windows else None,
        window_type=window[2] or None,
        window_mib=round(window_mib, 2) if window_mib else None,
        window_bits=float(window[4]) if window[4] else None,
        ctx=int(n_ctx[1]) if n_ctx else None,
        ubatch=int(ubatch[1]) if ubatch else None,
        devices=tuple(dict.fromkeys(f"{name} ({what})" for name, what in _DEVICE.findall(text))),
        gpu=tuple(dict.fromkeys(_GPU.findall(text))),
        layers_offloaded=int(offloaded[1]) if offloaded else None,
        layers=int(offloaded[2]) if offloaded else None,
        graph_splits=max(splits) if splits else None,
        config_files=tuple(_CONFIG_FILE.findall(text)),
    )


def _plain(splits: str) -> str:
    """ "2 (with bs=512), 3 (with bs=1)" → "2 , 3 "."""
    return re.sub(r"\(.*?\)", "", splits)


def _flash_state(flash: re.Match[str] | None, auto: re.Match[str] | None) -> bool | None:
    if auto:
        return auto[1] == "enabled"
    if flash and flash[1] in ("enabled", "disabled"):
        return flash[1] == "enabled"
    return None


def parse_ppl(text: str) -> PplText:
    """Read a llama-perplexity log, of either kind of run."""
    total = _TOTAL.search(text)
    kld = parse_kld(text)
    final = _FINAL.search(text)
    if kld is not None:
        mean = _stat(text, r"Mean PPL\(Q\)")
        ppl, err = mean if mean else (None, None)
        running = [float(m[2]) for m in _KLD_ROW.finditer(text)]
    else:
        ppl, err = (float(final[1]), float(final[2])) if final else (None, None)
        running = [float(m[2]) for m in _RUNNING.finditer(text)]
        running = running or [float(m[2]) for m in _KLD_ROW.finditer(text)]
    return PplText(ppl, err, tuple(running), int(total[1]) if total else None, kld)


def parse_kld(text: str) -> Kld | None:
    """The statistics block of a --kl-divergence run; None if it isn't there in full."""
    values: dict[str, float | None] = {}
    for name, label in (
        ("mean", r"Mean\s+KLD"),
        ("ppl_base", r"Mean PPL\(base\)"),
        ("ln_ratio", r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"),
        ("ratio", r"Mean PPL\(Q\)/PPL\(base\)"),
        ("rms_dp_pct", r"RMS Δp"),
        ("same_top_pct", r"Same top p"),
    ):
        found = _stat(text, label)
        if found is None:
            return None
        values[name] = found[0]
        values[f"{name}_err"] = found[1] if math.isfinite(found[1]) else None
    for name, label in (
        ("median", r"Median\s+KLD"),
        ("p90", r"90\.0%\s+KLD"),
        ("p99", r"99\.0%\s+KLD"),
        ("p999", r"99\.9%\s+KLD"),
        ("max", r"Maximum KLD"),
    ):
        one = re.search(rf"^\s*{label}\s*:\s*{_NUM}", text, re.M)
        if one is None:
            return None
        values[name] = float(one[1])
    return Kld.model_validate(values)


def _stat(text: str, label: str) -> tuple[float, float] | None:
    found = re.search(rf"^\s*{label}\s*:\s*{_NUM}\s*±\s*{_NUM}", text, re.M)
    return (float(found[1]), float(found[2])) if found else None


# Lines by which llama.cpp explains that it will not run; the first match is the reason.
_REFUSALS = (
    re.compile(r"[KV] cache type \S+ with block size \d+ does not divide n_embd_head_[kv]=\d+"),
    re.compile(r"V cache quantization requires flash_attn.*"),
    re.compile(r"quantized V cache (?:was requested|requires).*", re.I),
    re.compile(r"\S+ has no Flash Attention kernel for a KV cache with .*"),
    re.compile(r"error: invalid argument: \S+"),
    re.compile(r"Unsupported cache type: \S+"),
    re.compile(r"^.*(?:no kernel|not supported|unsupported).*(?:turbo|cache|pair|K/V).*$", re.I | re.M),
)
_ERRORS = re.compile(
    r"^.*(?:GGML_ASSERT|GGML_ABORT|error:|failed to|fatal|out of memory|unable to).*$", re.I | re.M
)
_SHORT = re.compile(r"tokenizes to only (\d+) tokens")


def refusal(text: str) -> str | None:
    """llama.cpp's own sentence for not running this configuration, if there is one."""
    for pattern in _REFUSALS:
        found = pattern.search(text)
        if found:
            return found[0].strip()
    return None


def corpus_tokens_if_short(text: str) -> int | None:
    """Tokens in the corpus, if llama-perplexity found them too few for the context."""
    found = _SHORT.search(text)
    return int(found[1]) if found else None


def lost_its_end(text: str) -> bool:
    """The passes began, but neither a final figure nor an error was printed."""
    ended = _FINAL.search(text) or _stat(text, r"Mean\s+KLD") or last_error(text)
    return "seconds per pass" in text and ended is None


def last_error(text: str) -> str | None:
    """The last line that looks like an error."""
    found = _ERRORS.findall(text)
    return found[-1].strip()[:300] if found else None


_CONTEXT = re.compile(r"^create: context for (\S+) \(anchor ", re.M)
# kv-eval: batched chunk 2/8, 31 s left, perplexity: f16:f16,anchor=off,recent=0,first=0 13.0665 …
_SCORED = re.compile(r"^kv-eval: (batched|one-token) chunk (\d+)/(\d+), .*? left, perplexity:(.*)$", re.M)
_TOO_FEW = re.compile(r"error: (the text has \d+ tokens, \d+ chunk\(s\) of \d+ from chunk \d+ on need \d+)")
_TOO_LARGE = re.compile(r"error: (\d+ contexts of \d+ tokens need .*? are there)")


def contexts(text: str) -> dict[str, str]:
    """What llama-kv-eval said of each cache, by the cache as it was told of it: the lines on the model, then
    those on its own context."""
    starts = list(_CONTEXT.finditer(text))
    ends = [found.start() for found in starts[1:]] + [len(text)] * bool(starts)
    common = text[: starts[0].start()] if starts else text
    return {found[1]: common + text[found.start() : end] for found, end in zip(starts, ends, strict=True)}


@dataclass(frozen=True)
class Scored:
    """A line of progress: `chunk` of `total` done, perplexities so far by cache."""

    one_token: bool
    chunk: int
    total: int
    ppl: dict[str, float]


def scored(text: str) -> list[Scored]:
    """Progress of llama-kv-eval in whole lines of its output."""
    found = []
    for path, chunk, total, figures in _SCORED.findall(text):
        words = figures.split()
        ppl = {name: float(x) for name, x in zip(words[::2], words[1::2], strict=False)}
        found.append(Scored(path == "one-token", int(chunk), int(total), ppl))
    return found


def text_too_short(text: str) -> str | None:
    """llama-kv-eval's sentence on a text that has not as many chunks, if there is one."""
    found = _TOO_FEW.search(text)
    return found[1] if found else None


def memory_too_small(text: str) -> str | None:
    """llama-kv-eval's sentence on contexts that do not fit together, if there is one."""
    found = _TOO_LARGE.search(text)
    return found[1] if found else None


@dataclass
class ProgressScanner:
    """Follows a running llama-perplexity; feed it text as it comes.

    Attributes:
        total: chunks it will compute, once it said so.
        chunk: chunks finished.
        ppl: perplexity over those.
    """

    total: int | None = None
    chunk: int = 0
    ppl: float | None = None
    _tail: str = field(default="", repr=False)

    def feed(self, text: str) -> bool:
        """Take more output; True if the state changed."""
        self._tail += text
        before = (self.total, self.chunk)
        if self.total is None and (total := _TOTAL.search(self._tail)):
            self.total = int(total[1])
        end = 0
        for pattern in (_RUNNING, _KLD_ROW):
            for found in pattern.finditer(self._tail):
                if int(found[1]) == self.chunk + 1:
                    self.chunk, self.ppl = int(found[1]), float(found[2])
                    end = found.end()
        # Rows end in a newline or comma, so nothing before the last match is needed again.
        self._tail = self._tail[end:] if end else self._tail[-4096:]
        return (self.total, self.chunk) != before
