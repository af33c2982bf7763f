"""Report and documentation in a real Chromium: axe-core finds nothing, light and dark, phone and desk.

Nothing is asked of any other server, nothing is written to the console, and no page is wider than its window.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.test_bench import bench_record
from tests.support.browser import CHROMIUM, SCHEMES, WIDTHS, chromium, opened, served, violations
from tests.support.records import make_kld, make_record, with_tokens
from turbo_eval.analysis.report import write_report
from turbo_eval.util.paths import repo_root

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs the Debian package chromium, which .ci/run installs"
)
EVERY_VIEW = [(width, scheme) for width in WIDTHS for scheme in SCHEMES]
RECORDS = [
    make_record(ppl=10.0, kld=make_kld(1e-6, 100.0)),
    make_record("q8_0:q8_0", 10.02, kld=make_kld(0.0042)),
    make_record("q4_0:q4_0", 10.4, kld=make_kld(0.0512)),
    make_record("q8_0:turbo3", 10.09, kld=make_kld(0.0123)),
    make_record("q8_0:turbo4", 10.03, kld=make_kld(0.0072)),
    make_record("turbo3:turbo3", 3556.0, kld=make_kld(2.5)),
    make_record("turbo4:turbo4", status="crash", detail="killed by SIGSEGV", metric="kld"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


BENCHES = [
    bench_record(
        k=k, v=v, depth=depth, decode=(speed,), decode_f16=(50.0,), prefill=(speed,), prefill_f16=(50.0,)
    )
    for k, v, speed in (("q8_0", "turbo3", 60.0), ("q8_0", "q8_0", 45.0))
    for depth in (0, 4096)
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Everything that a report can hold: figures of each token and speeds too."""
    folder = tmp_path_factory.mktemp("report")
    records = [r if r.kld is None else with_tokens(r, folder / "results") for r in RECORDS]
    with served(write_report(records, BENCHES, folder / "out", [folder / "results"]).parent) as home:
        yield f"{home}/index.html"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with served(folder) as home:
        yield home, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html"))


@pytest.mark.parametrize(("width", "scheme"), EVERY_VIEW)
def test_the_report(browser: Any, report: str, width: int, scheme: str) -> None:
    with opened(browser, report, width, scheme) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_axe_finds_what_is_broken(browser: Any, report: str) -> None:
    with opened(browser, report, 1200, "light") as page:
        page.evaluate("document.documentElement.lang = ''; document.querySelector('h1').style.color = '#eee'")
        assert {line.split()[0] for line in violations(page)} >= {"html-has-lang", "color-contrast"}


# one page of each kind
KINDS = ("start/index.html", "reference/cli.html", "explanation/cuda.html", "404.html")


@pytest.mark.parametrize(("width", "scheme"), EVERY_VIEW)
def test_the_documentation(browser: Any, site: tuple[str, list[str]], width: int, scheme: str) -> None:
    """A quarter of the pages in each view, and one of each kind in all."""
    home, names = site
    assert len(names) > 20 and set(KINDS) <= set(names)
    own = names[EVERY_VIEW.index((width, scheme)) :: len(EVERY_VIEW)]
    assert _broken(browser, home, {*own, *KINDS}, width, scheme) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), EVERY_VIEW)
def test_every_page_in_every_view(browser: Any, site: tuple[str, list[str]], width: int, scheme: str) -> None:
    home, names = site
    assert _broken(browser, home, set(names), width, scheme) == {}


def _broken(browser: Any, home: str, names: set[str], width: int, scheme: str) -> dict[str, list[str]]:
    """What is wrong with each page, by its name."""
    broken: dict[str, list[str]] = {}
    for name in sorted(names):
        with opened(browser, f"{home}/{name}", width, scheme) as page:
            found = violations(page)
            if page.evaluate("document.documentElement.scrollWidth") > width:
                found.append("it is wider than the window")
            if found:
                broken[name] = found
    return broken


def test_tables_sort_and_filter(browser: Any, report: str) -> None:
    with opened(browser, report, 1200, "light") as page:
        table = page.locator("table.sorts").first
        names = table.locator("tbody tr")
        before = names.all_text_contents()
        button = table.locator("th button", has_text="ΔPPL")
        button.focus()
        page.keyboard.press("Enter")
        assert table.locator("th[aria-sort=ascending]").inner_text().startswith("ΔPPL")
        first = names.all_text_contents()
        assert sorted(first) == sorted(before) and first != before
        assert "+0.00" in first[0] and "35460" in first[-2]
        page.locator(".filter input").first.fill("turbo4 crash")
        assert names.filter(visible=True).count() == 1


def test_command_lines_are_copied_and_names_lead_to_rows(browser: Any, report: str) -> None:
    with opened(browser, report, 1200, "light") as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        line = page.locator(".command").first
        line.get_by_role("button", name="Copy").click()
        assert page.evaluate("navigator.clipboard.readText()") == line.locator("code").inner_text()
        links = page.locator("svg a", has_text="q8_0/turbo3")
        assert links.count() == 2  # in the front and over the position
        for number in range(2):
            page.evaluate("location.hash = ''")
            links.nth(number).click()
            assert page.locator("tr:target").locator("td").nth(1).inner_text() == "turbo3"


def test_it_holds_the_same_without_scripts(browser: Any, report: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report)
    assert page.locator("table.sorts").first.locator("tbody tr").count() == 7
    assert page.locator("svg").count() == 3
    assert "llama-server -m tiny.gguf -fa on" in page.locator(".command code").first.inner_text()
    context.close()
