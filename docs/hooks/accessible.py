"""What the theme and Markdown leave out of HTML that a screen reader wants; axe-core checks the result."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_EMPTY_HEAD = re.compile(r"<th([^>]*)>\s*</th>")
_SEARCH = 'data-md-component="search" role="dialog"'
# a section's navigation, and its title: with an index page its label holds nothing but an arrow
_SECTION = re.compile(
    r'aria-labelledby="(__nav_[\d_]+)_label"(?P<rest>[^>]*>\s*<label class="md-nav__title" for="\1">\s*'
    r"<span[^>]*></span>\s*(?P<title>[^<]+?)\s*</label>)"
)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A heading without words is a plain cell."""
    return _EMPTY_HEAD.sub(r"<td\1></td>", html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Search and sections have names."""
    return _named(output)


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """The same on the page for what is not there."""
    return _named(output) if template_name.endswith(".html") else output


def _named(html: str) -> str:
    html = html.replace(_SEARCH, f'{_SEARCH} aria-label="Search"')
    return _SECTION.sub(lambda found: f'aria-label="{found["title"]}"{found["rest"]}', html)
