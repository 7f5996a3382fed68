"""Tables as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbolens_server.files import write_file, write_files


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; its columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def with_interval(row: Mapping[str, Any], measure: str, digits: int = 3) -> str:
    """A row's `measure` with the interval that stands beside it as `measure`_95."""
    low, high = row[f"{measure}_95"]
    return f"{row[measure]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def fill(page: Path, mark: str, text: str) -> None:
    """Put a text between `<!-- mark -->` and `<!-- end -->` in a page, in place of what is there.

    A page that has no such mark, or that is not there, is left alone: reports may be written anywhere.
    """
    if not page.is_file():
        return
    whole = page.read_text(encoding="utf-8")
    before, found, rest = whole.partition(f"<!-- {mark} -->\n")
    _, ends, after = rest.partition("<!-- end -->\n")
    if found and ends:
        write_file(page, f"{before}{found}{text}{ends}{after}")


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `path`.md and `path`.json."""
    files = {".md": markdown_table(rows), ".json": json.dumps(list(rows), indent=1) + "\n"}
    write_files({path.with_suffix(ending): content for ending, content in files.items()})
