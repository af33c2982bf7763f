"""Build a pinned, patched llama.cpp and measure what K/V cache types cost."""

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, asked when it is wanted: reading package metadata is slow beside `--help`."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 slow beside --help

    try:
        return version("turbo-eval")
    except PackageNotFoundError:  # sources on the path, nothing installed
        return "0+unknown"
