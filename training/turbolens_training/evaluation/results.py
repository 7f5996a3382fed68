"""One folder of results: tables, figures, and a report with all of them, as Markdown and as a single HTML file."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from turbolens_server.files import write_files
from turbolens_training.measures.report import markdown_table, write_table

Rows = Sequence[Mapping[str, object]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left }
img { max-width: 100% }
details { margin: 1rem 0 }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a report."""

    title: str
    text: str
    """What the numbers mean, in plain words."""
    tables: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    """By file name without its ending."""
    figures: Sequence[str] = ()
    """Names of PNG files in the folder."""
    folded: frozenset[str] = frozenset()
    """Tables that are too long to read: files of their own, folded in the HTML, named in the Markdown."""


def write_report(folder: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> None:
    """Write every table (JSON, Markdown), report.md and report.html; the figures are there already."""
    for section in sections:
        for name, rows in section.tables.items():
            write_table(folder / name, rows)
    files = {"report.md": to_markdown(title, facts, sections), "report.html": to_html(folder, title, facts, sections)}
    write_files({folder / name: content for name, content in files.items()})


def to_markdown(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The report as Markdown, with links to figures and folded tables."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        for name, rows in section.tables.items():
            lines += [f"[{name}]({name}.md)" if name in section.folded else markdown_table(rows), ""]
        lines += [line for name in section.figures for line in (f"![{section.title}]({name})", "")]
    return "\n".join(lines)


def to_html(folder: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The report as one HTML page that needs no other file: pictures are inlined."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><ul>",
        *(f"<li>{html.escape(name)}: {html.escape(value)}</li>" for name, value in facts.items()),
        "</ul>",
    ]
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
        for name, rows in section.tables.items():
            table = _html_table(rows)
            folded = name in section.folded
            parts.append(f"<details><summary>{html.escape(name)}</summary>{table}</details>" if folded else table)
        for name in section.figures:
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    return "\n".join([*parts, "</body></html>", ""])


def _html_table(rows: Rows) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ["".join(f"<td>{html.escape(str(row.get(c, '')))}</td>" for c in columns) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
