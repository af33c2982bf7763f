"""The report page: its numbers, and how a real headless Chromium takes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.records import make_kld, make_record, with_tokens
from turbo_eval.analysis.figures import level
from turbo_eval.analysis.picture import over_position
from turbo_eval.analysis.picture.cards import cards
from turbo_eval.analysis.picture.front import draw
from turbo_eval.analysis.picture.points import front as front_of
from turbo_eval.analysis.report import conclusion, html_page, markdown, write_report
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.records.cell import CellProfile
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


PROFILE = CellProfile(sha256="3" * 64, types_k="turbo4:0-29", types_v="turbo2:0-29", bits_k=4.25, bits_v=2.25)


def test_a_profile_is_in_picture_and_card() -> None:
    """It is a point of its own kind, and its command names the file, not types that no option takes."""
    own = make_record("tiny-3.25:3.25", 10.03, kld=make_kld(0.006), profile=PROFILE, recent=128, first=4)
    argv = ("llama-kv-eval", "--pair", "f16:f16,profile=/home/somebody/tiny-3.25.kv-profile.gguf")
    own = own.model_copy(update={"run": own.run.model_copy(update={"argv": argv})})
    rows = summarize([*RECORDS, own])
    found = front_of(rows)
    assert found is not None
    [point] = [p for p in found.points if p.kind == "profile"]
    assert point.front and point.pair == "tiny-3.25" and point.bits == 3.25
    legend = draw(found).axes[0].get_legend()
    assert legend is not None
    assert "KV profile: types by layer" in [text.get_text() for text in legend.get_texts()]
    [card] = cards([rows])
    chosen = {choice.name: choice.command for choice in card.choices}
    assert chosen[point.name] == (
        "llama-server -m tiny.gguf -fa on --kv-profile tiny-3.25.kv-profile.gguf"
        " --kv-recent 128 --kv-first 4 --kv-anchor off"
    )


def test_kld_over_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each pair whose figures of each token are there, with the intervals of the statistics."""
    records = [
        record if record.kld is None else with_tokens(record, tmp_path, growth=3.0, seed=seed)
        for seed, record in enumerate(RECORDS)
    ]
    gone, swapped = records[1], records[2]
    assert gone.tokens is not None and swapped.tokens is not None
    (tmp_path / gone.tokens.file).unlink()
    (tmp_path / swapped.tokens.file).write_bytes(b"of another machine")
    rows = summarize(records)
    found = over_position.lines(rows, [tmp_path / "none", tmp_path])
    assert [line.name for line in found] == ["q8_0/turbo3", "turbo3/turbo3"]
    assert rows[found[0].row].name == "q8_0/turbo3"
    assert "is not the file that its record speaks of; it is left out" in capsys.readouterr().err
    spans = found[0].spans
    assert (spans[0].first, spans[-1].last, len(spans)) == (257, 511, over_position.SPANS)
    grown = spans[-1].kld.value / spans[0].kld.value
    assert 2 < grown < 3.5  # of the noise's 3; the ends are means over an eighth
    assert all(span.kld.low < span.kld.value < span.kld.high for span in spans)
    columns, lines = over_position.as_table(found)
    assert columns[1:] == ["q8_0/turbo3", "turbo3/turbo3"] and len(lines) == over_position.SPANS
    assert lines[0][0].startswith("257 – ") and "…" in lines[0][1]

    page = write_report(records, [], tmp_path / "report", [tmp_path]).read_text()
    assert "KL divergence over the position" in page and lines[3][1] in page
    assert page.count(f'xlink:href="#s1r{found[0].row}"') == 2  # from the front and from this figure
    assert (tmp_path / "report" / "figures" / "1-tiny-position.svg").is_file()
    assert "over the position" not in write_report(records, [], tmp_path / "without").read_text()


def test_one_chunk_has_no_interval(tmp_path: Path) -> None:
    own = make_record("q4_0:q4_0", 10.4, kld=make_kld(0.05), chunks=1)
    base = make_record(ppl=10.0, kld=make_kld(1e-6), chunks=1)
    found = over_position.lines(summarize([base, with_tokens(own, tmp_path)]), [tmp_path])
    assert "…" not in str(over_position.as_table(found))
    assert over_position.draw(found).axes[0].get_lines()


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
