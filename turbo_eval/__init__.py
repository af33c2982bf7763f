"""Build a pinned, patched llama.cpp and measure what K/V cache types cost."""

__version__ = "0.1.0"
