"""Build a pinned, patched llama.cpp and measure what K/V cache types cost."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("turbo-eval")
except PackageNotFoundError:  # sources on the path, nothing installed
    __version__ = "0+unknown"
