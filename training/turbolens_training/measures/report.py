"""Tables as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from turbolens_server.files import write_files


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table; its columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `path`.md and `path`.json."""
    files = {".md": markdown_table(rows), ".json": json.dumps(list(rows), indent=1) + "\n"}
    write_files({path.with_suffix(ending): content for ending, content in files.items()})
