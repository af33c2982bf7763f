"""The report page: its numbers, and how a real headless Chromium takes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.records import make_kld, make_record
from turbo_eval.analysis.figures import level
from turbo_eval.analysis.picture.points import front as front_of
from turbo_eval.analysis.report import conclusion, html_page, markdown, write_report
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.records.record import Record

RECORDS = [
    make_record(ppl=10.0, kld=make_kld(1e-6, 100.0)),
    make_record("q8_0:q8_0", 10.02, kld=make_kld(0.0042)),
    make_record("q4_0:q4_0", 10.4, kld=make_kld(0.0512)),
    make_record("q8_0:turbo3", 10.09, kld=make_kld(0.0123)),
    make_record("turbo3:turbo3", 3556.0, kld=make_kld(2.5)),
    make_record("turbo4:turbo4", status="crash", detail="killed by <SIGSEGV>", metric="kld"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(RECORDS, [], tmp_path_factory.mktemp("report"))


def test_the_page_fetches_nothing(page: Path) -> None:
    text = page.read_text()
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:resource="[^"]*"', "", text)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", without_names)
    assert "@import" not in text and "url(" not in text.replace("url(#", "")


def test_the_page_holds_the_numbers(page: Path) -> None:
    text = page.read_text()
    for shown in ("10.0900", "+0.90", "0.0123", "+4.00", "3556", "8.5/3.25", "crash"):
        assert shown in text, shown
    assert "killed by &lt;SIGSEGV&gt;" in text and "<SIGSEGV>" not in text
    # the answer first, what failed named at the top and told below
    assert text.index('href="#failures"') < text.index("id='answer'") < text.index("id='failures'")
    assert len(page.read_bytes()) < 1_500_000


def test_figures_are_files_too(page: Path) -> None:
    names = {p.name for p in (page.parent / "figures").iterdir()}
    assert {"1-tiny-front.svg", "1-tiny-front.png", "1-tiny-kld.svg"} <= names
    assert (page.parent / "report.md").read_text().count("| q8_0 | turbo3 |") == 1


def test_verdict_in_words() -> None:
    said = " ".join(conclusion(summarize(RECORDS)))
    assert "Within 1 % of the perplexity of f16/f16, q8_0/turbo3 is the smallest cache: 5.875 bits" in said
    assert "Unusable here (perplexity more than doubled): turbo3/turbo3" in said
    assert "1 of 6 pairs have no number" in said
    alone = " ".join(conclusion(summarize([make_record("q4_0:q4_0", 10.4)])))
    assert "no verdict" in alone


def _front(records: list[Record]) -> list[str]:
    found = front_of(summarize(records))
    assert found is not None and found.destroyed == ("turbo3/turbo3",)
    return [point.name for point in found.best()]


def test_pareto_front() -> None:
    front = _front(RECORDS)
    # few bits to many: each better than all that are smaller; turbo3/turbo3's perplexity is 3556
    assert front == ["q4_0/q4_0", "q8_0/turbo3", "q8_0/q8_0"]
    worse = make_record("q5_1:q5_1", 11.0, kld=make_kld(0.2))
    assert "q5_1/q5_1" not in _front([*RECORDS, worse])


def test_heat_levels_grow_with_the_loss() -> None:
    assert [level(x, "kld") for x in (0.0, 0.005, 0.02, 0.05, 0.2, 3.0)] == [0, 1, 2, 3, 4, 5]


def test_markdown_and_page_of_nothing_but_failures() -> None:
    failed = [make_record(status="nan", detail="nan from chunk 1 on")]
    groups = [group for _, group in by_setting(summarize(failed))]
    assert "no verdict" in markdown(groups, failed, [])
    assert "nan from chunk 1 on" in html_page(groups, failed, [])


CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium, which .ci/run installs")
@pytest.mark.parametrize(("size", "dark"), [("1280,2400", False), ("390,2400", True)])
def test_in_chromium(page: Path, tmp_path: Path, size: str, dark: bool) -> None:
    """It renders on a desk and on a phone, in light and dark, without a console message."""
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [
            *(str(CHROMIUM), *FLAGS, *scheme, f"--user-data-dir={tmp_path / 'profile'}"),
            *("--enable-logging=stderr", f"--window-size={size}", f"--screenshot={shot}"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium, which .ci/run installs")
def test_a_phone_does_not_scroll_sideways(page: Path, tmp_path: Path) -> None:
    """The browser's own layout: the page is no wider than the window, wide tables scroll inside."""
    probe = tmp_path / "probe.html"
    script = (
        "<script>document.title=JSON.stringify([document.documentElement.scrollWidth,"
        "document.documentElement.clientWidth,document.querySelectorAll('td').length,"
        "document.querySelector('.skip').getBoundingClientRect().right<0,"
        "[...document.querySelectorAll('nav a')].every(a=>document.querySelector(a.getAttribute('href')))])"
        "</script></body>"
    )
    probe.write_text(page.read_text().replace("</body>", script))
    done = subprocess.run(
        [
            *(str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900"),
            *("--dump-dom", probe.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>\[(\d+),(\d+),(\d+),(\w+),(\w+)\]</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    assert int(title[1]) <= int(title[2]), "the page is wider than the window"
    assert int(title[3]) > 40
    assert (title[4], title[5]) == ("true", "true")
