"""Markdown that lies beside docs/ becomes part of the site, and links between the two hold in both places.

A link in the sources points to a file of the repository, so that it works where the repository is read. Here
it is turned to the page that the file became. A file that is no page (a config, a test) becomes its path in
plain type.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# file of the repository -> page
BESIDE = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "patches/README.md": "project/patches.md",
    "metal-emu/README.md": "project/metal-emu.md",
}
SOURCE_OF = {page: name for name, page in BESIDE.items()}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of BESIDE as pages."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to pages.

    Raises:
        PluginError: a link names a file that isn't there.
    """
    uri = page.file.src_uri
    source = ROOT / SOURCE_OF[uri] if uri in SOURCE_OF else DOCS / uri
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _turned(link, source, uri), part) for part in parts[::2]]
    return "".join(parts)


def _turned(link: re.Match[str], source: Path, uri: str) -> str:
    target = Path(os.path.normpath(source.parent / link["target"]))
    inside = target.is_relative_to(DOCS)
    if inside and uri not in SOURCE_OF and not target.is_dir():
        return link[0]  # MkDocs checks it
    if not target.exists() and not inside:
        raise PluginError(f"{source.relative_to(ROOT)}: {link['target']} is not there")
    name = target.relative_to(ROOT).as_posix()
    if inside:
        page = target.relative_to(DOCS).as_posix() + ("/index.md" if target.is_dir() else "")
    elif name in BESIDE:
        page = BESIDE[name]
    else:
        return link["text"] if "`" in link["text"] else f"{link['text']} (`{name}`)"
    return f"[{link['text']}]({os.path.relpath(page, Path(uri).parent)}{link['anchor'] or ''})"
