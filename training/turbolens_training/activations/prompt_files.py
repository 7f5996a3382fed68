"""The one reader of prompts in files: text, CSV, JSON Lines and Parquet, each row of which is a prompt or says nothing.

No row decides for another: which columns hold text is asked of all of them, and null is null, never "None". What is no
table, or no text, is refused by its name and line.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from turbolens_server.files import first_line
from turbolens_training.activations.places import PromptError

TEXT: Final = "text"
"""The kind of a column that holds text; of any other, its type in words."""
_SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclasses.dataclass(frozen=True)
class Column:
    """The prompts of one column, or of a text file."""

    source: str
    """The file or dataset, as it was named."""
    column: str | None
    """None: it has none."""
    rows: Iterable[str | None]
    """As they stand; None where a row has none."""

    @property
    def name(self) -> str:
        """Where they are, for messages."""
        return self._name(self.source)

    @property
    def kind(self) -> str:
        """What they are, for the provenance of what is trained on them: it does not tell of folders."""
        return f"prompts of {self._name(Path(self.source).name)}"

    def _name(self, source: str) -> str:
        return source if self.column is None else f"{source}, column {self.column!r}"


def read_file(path: Path, column: str | None) -> Column:
    """The prompts of a file, read as they are asked for.

    Args:
        path: the file, whose ending says the format.
        column: where its prompts are; None: the only one with text.

    Raises:
        PromptError: the format is unknown, or the column cannot be told. The rows raise it too, where one is malformed.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{path}: {path.suffix or 'no suffix'}: not one of {', '.join(_READERS)}")
    return reader(path, column)


def choose_column(name: str, columns: Mapping[str, str], column: str | None) -> str:
    """The column to read: the one asked for, or the only one with text.

    Args:
        name: of the file, for messages.
        columns: the kind of each, `TEXT` or another.
        column: the one asked for.

    Raises:
        PromptError: it is not there or holds no text, or none was asked for and there is more or less than one.
    """
    texts = [other for other, kind in columns.items() if kind == TEXT]
    if column is None and len(texts) == 1:
        return texts[0]
    if column not in texts:
        kind = columns.get(column or "")
        wanted = "say which column" if column is None else f"no column {column!r} with text"
        wanted += f" (it holds {kind})" if kind else ""
        raise PromptError(f"{name}: {wanted}, as {Path(name).name}:COLUMN; it has {', '.join(texts) or 'none'}")
    return column


def kinds_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The kind of every column of rows; one that is null now and then is what it is elsewhere."""
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                found[name] = TEXT
            elif found.get(name, "null") == "null":
                found[name] = "null" if value is None else type(value).__name__
    return found


def check_text(value: Any, where: str) -> str | None:
    """A prompt as it stands; None where there is none.

    Raises:
        PromptError: it is no text, or none that can be written as UTF-8.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise PromptError(f"{where} is {type(value).__name__}, expected text")
    if "\0" in value:
        raise PromptError(f"{where} holds a NUL character; is it UTF-16?")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} holds half of a surrogate pair, which is no character") from error
    return value


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, ended by LF, CRLF or CR; other separators of Unicode are part of a line.

    Raises:
        PromptError: a line is not UTF-8.
    """
    for number, line in _lines(path):
        for part in line.removesuffix("\n").removesuffix("\r").split("\r"):
            yield check_text(part, f"{path}, line {number}:") or ""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line as it stands, without a byte-order mark.

    Raises:
        PromptError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PromptError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error


def _read_text(path: Path, column: str | None) -> Column:
    if column is not None:
        raise PromptError(f"{path}: a text file has no columns; leave out :{column}")
    return Column(str(path), None, read_lines(path))


def _read_csv(path: Path, column: str | None) -> Column:
    separator = _separator(path)

    def table() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((line for _, line in _lines(path)), strict=True, delimiter=separator)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise PromptError(f"{path}, line {reader.line_num}: {error}") from error

    _, header = next(table(), (0, []))
    chosen = choose_column(str(path), dict.fromkeys(header, TEXT), column)
    if header.count(chosen) > 1:
        raise PromptError(f"{path}: {header.count(chosen)} columns are called {chosen!r}")
    place = header.index(chosen)

    def rows() -> Iterator[str | None]:
        for number, row in table():
            if row and len(row) != len(header):
                raise PromptError(f"{path}, line {number}: {len(row)} fields, the header has {len(header)}")
            yield check_text(row[place], f"{path}, line {number}: {chosen!r}") if row else None

    return Column(str(path), chosen, _without_first(rows()))


def _separator(path: Path) -> str:
    """What separates the fields of a header: the one that gives more than one, or a comma where there is one field.

    Raises:
        PromptError: several do.
    """
    _, header = next(_lines(path), (1, ""))
    found = [mark for mark in _SEPARATORS if len(next(csv.reader([header], delimiter=mark), [])) > 1]
    if len(found) > 1:
        names = " and ".join(_SEPARATORS[mark] for mark in found)
        raise PromptError(f"{path}, line 1: the header has {names}; quote the names of columns that hold one")
    return found[0] if found else ","


def _without_first(rows: Iterator[str | None]) -> Iterator[str | None]:
    next(rows, None)
    return rows


def _read_jsonl(path: Path, column: str | None) -> Column:
    def objects() -> Iterator[tuple[int, dict[str, Any] | None]]:
        for number, line in _lines(path):
            if not line.strip():
                yield number, None
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PromptError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise PromptError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            yield number, row

    chosen = column or choose_column(str(path), kinds_of(row for _, row in objects() if row is not None), None)

    def rows() -> Iterator[str | None]:
        for number, row in objects():
            if row is not None and chosen not in row:
                raise PromptError(f"{path}, line {number}: no {chosen!r}; it has {', '.join(row) or 'nothing'}")
            yield None if row is None else check_text(row[chosen], f"{path}, line {number}: {chosen!r}")

    return Column(str(path), chosen, rows())


def _read_parquet(path: Path, column: str | None) -> Column:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    chosen = choose_column(str(path), {field.name: _kind(field.type) for field in schema}, column)
    if schema.names.count(chosen) > 1:
        raise PromptError(f"{path}: {schema.names.count(chosen)} columns are called {chosen!r}")

    def rows() -> Iterator[str | None]:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=[chosen]):
                    for value in batch.column(chosen).to_pylist():
                        number += 1
                        yield check_text(value, f"{path}, row {number}: {chosen!r}")
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error

    return Column(str(path), chosen, rows())


def _kind(type_: Any) -> str:
    """Of a Parquet column; one of categories holds what its categories are."""
    held = type_.value_type if pa.types.is_dictionary(type_) else type_
    text = pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)
    return TEXT if text else str(type_)


def _unreadable(path: Path, error: Exception) -> PromptError:
    return PromptError(f"{path}: cannot be read as Parquet ({first_line(error)})")


_READERS: Final[dict[str, Callable[[Path, str | None], Column]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
