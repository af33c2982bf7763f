"""A page for each folder of results/reference/, and a table of them where gallery/index.md asks for it."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from turbo_eval.analysis.report import html_page
from turbo_eval.analysis.summary import by_setting, summarize
from turbo_eval.records.provenance import Machine
from turbo_eval.records.record import Record
from turbo_eval.records.speed import read_bench
from turbo_eval.records.store import read_all, record_folders

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
MARK = "<!-- gallery -->"


def folders() -> list[Path]:
    """Those that hold records."""
    found = sorted(p for p in REFERENCE.glob("*") if p.is_dir()) if REFERENCE.is_dir() else []
    return [folder for folder in found if read_all([folder])]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the report of each folder."""
    for folder in folders():
        records = read_all([folder])
        groups = [rows for _, rows in by_setting(summarize(records))]
        text = html_page(groups, records, read_bench(folder), record_folders([folder]))
        files.append(File.generated(config, f"gallery/{folder.name}.html", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The table of pages."""
    if MARK not in markdown:
        return markdown
    lines = ["| measured | models | hardware | records |", "|---|---|---|---:|"]
    lines += [_line(folder, read_all([folder])) for folder in folders()]
    return markdown.replace(MARK, "\n".join(lines))


def _line(folder: Path, records: list[Record]) -> str:
    models = ", ".join(sorted({r.cell.model.split("/")[-1] for r in records}))
    where = {f"{m.cpu}, {m.cores} cores{', ' + m.gpu if m.gpu else ''}" for m in _machines(records)}
    return f"| [{folder.name}]({folder.name}.html) | {models} | {'; '.join(sorted(where))} | {len(records)} |"


def _machines(records: list[Record]) -> list[Machine]:
    return [r.provenance.machine for r in records]
