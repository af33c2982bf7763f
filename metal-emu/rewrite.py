"""Turn llama.cpp's Metal sources into C++ that the emulator compiles.

    rewrite.py SRC OUT      SRC: a llama.cpp tree, OUT: where the generated files go

Writes OUT/kernels/*.cpp (one per library that ggml-metal-device.m lists), the headers they include, and
OUT/device-extract.inc: the plain C parts of ggml-metal-device.m (device names, supports_op), taken over
verbatim so that the emulated device accepts exactly what a Mac accepts.

The kernels' code is not changed; only what C++ cannot express is: attributes of parameters become binding
tables, `[[host_name]]` instantiations become registrations, `[[function_constant]]` globals become checked
objects, `threadgroup T x[N]` locals become guarded memory, and loop pragmas go (with them one file takes
minutes to compile).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Metal attribute -> emu::bind_kind; buffers and threadgroup memory carry an index
ATTRIBUTES = {
    "threadgroup_position_in_grid",
    "thread_position_in_threadgroup",
    "thread_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
}


class RewriteError(Exception):
    """The source has a construct the rewriter does not know."""


def strip_comments(text: str) -> str:
    """Blank out comments, keeping line numbers."""

    def blank(m: re.Match[str]) -> str:
        s = m.group(0)
        return s if s.startswith('"') else " " + "\n" * s.count("\n")

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.S)


def matching(text: str, start: int, pair: str = "()") -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == pair[0]:
            depth += 1
        elif text[i] == pair[1]:
            depth -= 1
            if depth == 0:
                return i
    raise RewriteError(f"unbalanced {pair} after: {text[start : start + 60]!r}")


def split_params(text: str) -> list[str]:
    """Split a parameter list at its top-level commas."""
    out, depth, last = [], 0, 0
    for i, c in enumerate(text):
        if c in "(<[{":
            depth += 1
        elif c in ")>]}":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[last:i])
            last = i + 1
    out.append(text[last:])
    return [p for p in out if p.strip()]


def bindings(name: str, params: str) -> tuple[str, str]:
    """Return (binding table entries, parameter list without attributes) of a kernel."""
    table, plain, next_buffer = [], [], 0
    for param in split_params(params):
        m = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]", param)
        attr = m.group(1) if m else None
        if attr is None or attr == "buffer":
            index = int(m.group(2)) if m else next_buffer
            next_buffer = index + 1
            table.append(f"{{emu::bind_kind::buffer, {index}}}")
        elif attr == "threadgroup":
            table.append(f"{{emu::bind_kind::tgmem, {m.group(2)}}}")  # type: ignore[union-attr]
        elif attr in ATTRIBUTES:
            table.append(f"{{emu::bind_kind::{attr}, 0}}")
        else:
            raise RewriteError(f"{name}: parameter attribute [[{attr}]] is not known")
        plain.append(re.sub(r"\[\[.*?\]\]", "", param, flags=re.S))
    return ", ".join(table), ",".join(plain)


class Rewriter:
    """Rewrites one file; numbers what it generates."""

    def __init__(self, stem: str) -> None:
        self.stem = re.sub(r"\W", "_", stem)
        self.count = 0

    def unique(self) -> int:
        """A number not used before in this file."""
        self.count += 1
        return self.count

    def registration(self, host_name: str, function: str, table: str) -> str:
        """A static object that registers `function` under the name the host asks for."""
        return (
            f'static emu::reg emu_reg_{self.stem}_{self.unique()}("{host_name}", &emu_tu, '
            f"&emu::thunk<&{function}>::run, {table});"
        )

    def kernel_definitions(self, text: str) -> str:
        """Take the attributes off kernel parameters and emit their binding tables."""
        out, pos = [], 0
        pattern = re.compile(r'(?:\[\[\s*host_name\("([^"]+)"\s*\)\s*\]\]\s*)?\bkernel\s+void\s+(\w+)\s*\(')
        for m in pattern.finditer(text):
            host_name, name = m.group(1), m.group(2)
            open_ = m.end() - 1
            close = matching(text, open_)
            table, params = bindings(name, text[open_ + 1 : close])
            before = text[pos : m.start()]
            tables = f"static const emu::bind emu_b_{name}[] = {{{table}}};"
            template = re.search(r"template\s*<[^;{}]*>\s*$", before)
            if template:
                out += [before[: template.start()], tables, " ", template.group(0), f"void {name}({params})"]
            else:
                out += [before, tables, f" void {name}({params}); "]
                out += [
                    self.registration(host_name or name, name, f"emu_b_{name}"),
                    f" void {name}({params})",
                ]
            pos = close + 1
        out.append(text[pos:])
        return "".join(out)

    def instantiations(self, text: str) -> str:
        """`template [[host_name("x")]] kernel T f<...>;` -> a registration of f<...> as x."""

        def replace(m: re.Match[str]) -> str:
            function = " ".join(m.group(3).split())
            if m.group(2) == "void":  # the long form repeats the parameters
                function = function[: matching(function, function.index("<"), "<>") + 1]
            base = re.match(r"\w+", function)
            if base is None:
                raise RewriteError(f"instantiation of {m.group(1)}: no function name in {function!r}")
            return self.registration(m.group(1), function, f"emu_b_{base.group(0)}")

        return re.sub(
            r'template\s*\[\[\s*host_name\("([^"]+)"\s*\)\s*\]\]\s*kernel\s+(\w+)\s+(\w+\s*<[^;]*);',
            replace,
            text,
        )

    def rewrite(self, text: str) -> str:
        """The whole transformation of one file."""
        text = strip_comments(text)
        text = re.sub(r"^[ \t]*#pragma\s+(?:unroll|METAL|clang loop)[^\n]*", "", text, flags=re.M)
        text = re.sub(r'_Pragma\("clang loop[^"]*"\)', "", text)
        text = re.sub(
            r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(([^)]*)\)\s*\]\]\s*;",
            r'static emu::fc<\1> \2{&emu_tu, (\3), "\2"};',
            text,
        )
        text = re.sub(
            r"^([ \t]*)threadgroup\s+(\w+)\s+(\w+)\s*\[(.+)\];",
            lambda m: f"{m[1]}auto & {m[3]} = emu::tg_local<{m[2]}[{m[4]}]>({self.unique()});",
            text,
            flags=re.M,
        )
        text = self.instantiations(text)
        text = self.kernel_definitions(text)
        # function typedefs and some helpers carry parameter attributes too
        text = re.sub(
            r"\[\[\s*(\w+)\s*(?:\(\d+\))?\s*\]\]",
            lambda m: "" if m.group(1) in ATTRIBUTES | {"threadgroup"} else m.group(0),
            text,
        )
        left = re.search(r"\[\[(?!maybe_unused)[^\]]*\]\]", text)
        if left:
            raise RewriteError(f"{self.stem}: attribute left over: {left.group(0)}")
        return text


def library_names(device_m: str) -> list[str]:
    """The libraries ggml-metal-device.m compiles, in its order (the X macro GGML_METAL_LIBS)."""
    m = re.search(r"#define GGML_METAL_LIBS \\\n((?:.*\\\n)*.*\n)", device_m)
    if m is None:
        raise RewriteError("ggml-metal-device.m: GGML_METAL_LIBS not found")
    return re.findall(r"X\(\s*\w+\s*,\s*(\w+)\s*\)", m.group(1))


def cmake_sources(cmake: str) -> list[str]:
    """The kernel sources CMakeLists.txt compiles into default.metallib."""
    m = re.search(r"set\(METALLIB_KERNEL_SOURCES(.*?)\)", cmake, re.S)
    if m is None:
        raise RewriteError("ggml-metal/CMakeLists.txt: METALLIB_KERNEL_SOURCES not found")
    return re.findall(r"kernels/(\w+)\.metal", m.group(1))


def between(text: str, start: str, end: str) -> str:
    """The text from the line that starts with `start` to before the one that starts with `end`."""
    i = text.find("\n" + start)
    j = text.find("\n" + end, i + 1)
    if i < 0 or j < 0:
        raise RewriteError(f"ggml-metal-device.m: no text between {start!r} and {end!r}")
    return text[i + 1 : j + 1]


def write(path: Path, text: str) -> None:
    """Write only when changed, so that make rebuilds only what a source change touched."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main(argv: list[str]) -> int:
    """Command line: see the module's docstring."""
    if len(argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    metal = Path(argv[1]) / "ggml/src/ggml-metal"
    out = Path(argv[2])
    if not (metal / "kernels").is_dir():
        print(
            f"rewrite.py: {metal}/kernels does not exist; give the root of a llama.cpp tree", file=sys.stderr
        )
        return 2
    (out / "kernels").mkdir(parents=True, exist_ok=True)

    device_m = (metal / "ggml-metal-device.m").read_text()
    libs = library_names(device_m)
    sources = cmake_sources((metal / "CMakeLists.txt").read_text())
    if sorted(libs) != sorted(sources):
        diff = sorted(set(libs) ^ set(sources))
        print(f"rewrite.py: GGML_METAL_LIBS and CMakeLists.txt differ in: {', '.join(diff)}", file=sys.stderr)
        return 1

    try:
        included: set[str] = {"common.h", "dequantize.h", "quantize.h"}
        for lib in libs:
            text = (metal / f"kernels/{lib}.metal").read_text()
            included |= set(re.findall(r'#include "(\w+\.metal)"', text))
            write(
                out / f"kernels/{lib}.cpp",
                Rewriter(lib).rewrite(text) + f'\nstatic const int emu_named = (emu_tu.name = "{lib}", 0);\n',
            )
        for name in sorted(included):
            # fa_common.metal and the like are headers: what they register must be registered by each includer
            write(out / f"kernels/{name}", Rewriter(name).rewrite((metal / f"kernels/{name}").read_text()))
        write(
            out / "device-extract.inc",
            between(
                device_m,
                "static const struct {\n    const char *              name;",
                "ggml_metal_device_t ggml_metal_device_init(",
            )
            + between(
                device_m,
                "static bool ggml_metal_supports_mul_mat_op(",
                "static void ggml_metal_device_disable_tensor(",
            ),
        )
        write(out / "libs.mk", "KERNEL_LIBS := " + " ".join(libs) + "\n")
    except RewriteError as e:
        print(f"rewrite.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
