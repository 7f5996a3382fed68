"""Labels that others made, from their files into a bundle."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from turbolens_server.catalog.config import ImportLabelsConfig
from turbolens_server.catalog.labels import FeatureLabels, Label, read_labels, write_labels
from turbolens_server.files import first_line, hash_file
from turbolens_server.sae.bundle import load_bundle

_ENDINGS: Final = (".csv", ".json", ".jsonl", ".parquet")


class LabelFileError(ValueError):
    """A file of labels that cannot be used; the text names the file, and the row or column."""


def import_labels(config: ImportLabelsConfig) -> int:
    """Write the labels of a file into a bundle, in place of its own; returns how many features got one.

    Raises:
        LabelFileError: the file is unreadable, or a column, index or score in it cannot be used.
        BundleError: the bundle cannot be read.
    """
    bundle = load_bundle(config.sae)
    found: dict[int, Label] = {}
    for where, row in read_rows(config.file):
        _check_columns(config, row, where)
        if config.block is not None and _text(row[config.block], "block", where) != bundle.hook_point:
            continue
        index = _index(row[config.index], bundle.d_sae, where)
        if index in found:
            raise LabelFileError(f"{where}: feature {index} has a row already")
        found[index] = Label(
            attribute=(_text(row[config.attribute], "attribute", where) if config.attribute else "") or "label",
            value=_text(row[config.label], "label", where),
            region="",
            score=_score(config, row, where),
        )
    if not found:
        of = f" for {bundle.hook_point} in column {config.block}" if config.block else ""
        raise LabelFileError(f"{config.file}: holds no row{of}")
    told = {index: label for index, label in found.items() if label.value not in ("", *config.unlabelled)}
    known = read_labels(config.sae, bundle.d_sae)
    rows = []
    for index in range(bundle.d_sae):
        examples = known[index].examples if index in known else ()
        if label := told.get(index):
            rows.append(FeatureLabels(index, label.value, label.score, (label,), examples))
        else:
            rows.append(FeatureLabels(index, "", 0.0, (), examples))
    write_labels(
        config.sae,
        rows,
        zero_shot=None,  # labels by an encoder, if there were any, are gone
        labels={
            "source": config.source,
            "licence": config.licence,
            "file": config.file.name,
            "file_hash": hash_file(config.file),
            "labelled": len(told),
            "without_label": len(found) - len(told),
            "score": f"column {config.score}" if config.score else f"assumed {config.assumed_score}",
        },
    )
    return len(told)


def read_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a file of labels, each with where it is, for errors.

    Raises:
        LabelFileError: its ending is unknown, it is unreadable, or it is no list of objects.
    """
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise LabelFileError(f"{path}: cannot be read by its ending; there are {', '.join(_ENDINGS)}")
    try:
        rows = _rows(path, ending)
    except FileNotFoundError as error:
        raise LabelFileError(f"{path}: no such file") from error
    except Exception as error:  # csv, json and pyarrow raise many kinds
        raise LabelFileError(f"{path}: unreadable ({first_line(error)})") from error
    named: list[tuple[str, Mapping[str, Any]]] = []
    for at, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise LabelFileError(f"{path}, row {at}: a {type(row).__name__}, expected an object")
        named.append((f"{path}, row {at}", row))
    return named


def _rows(path: Path, ending: str) -> list[Any]:
    if ending == ".parquet":
        table: list[Any] = pq.read_table(path).to_pylist()
        return table
    text = path.read_text("utf-8-sig")
    if ending == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(reader.fieldnames or ())
        if doubled := sorted({name for name in header if header.count(name) > 1}):
            raise ValueError(f"several columns are called {doubled[0]!r}")
        records = list(reader)
        for at, record in enumerate(records, 1):
            if None in record or None in record.values():
                raise ValueError(f"row {at} has more or fewer fields than the header")
        return records
    if ending == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"holds a {type(rows).__name__}, expected a list of objects")
    return rows


def _check_columns(config: ImportLabelsConfig, row: Mapping[str, Any], where: str) -> None:
    wanted = {
        name: column
        for name in ("index", "label", "score", "attribute", "block")
        if (column := getattr(config, name)) is not None
    }
    for name, column in wanted.items():
        if column not in row:
            raise LabelFileError(f"{where}: no column {column!r}; name one of {', '.join(row)} with --{name}")


def _index(value: Any, d_sae: int, where: str) -> int:
    if isinstance(value, str):
        whole = re.fullmatch(r"-?[0-9]{1,9}", value.strip()) is not None
    else:
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole:
        raise LabelFileError(f"{where}: index {value!r} is no whole number")
    number = int(value)
    if not 0 <= number < d_sae:
        raise LabelFileError(f"{where}: index {number} is outside 0 to {d_sae - 1}")
    return number


def _text(value: Any, what: str, where: str) -> str:
    """A text, empty where there is none; a number or a list is not made one."""
    if value is None:
        return ""
    if not isinstance(value, str) or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise LabelFileError(f"{where}: {what} {str(value)[:60]!r} is no text of one line")
    return value.strip()


def _score(config: ImportLabelsConfig, row: Mapping[str, Any], where: str) -> float:
    if config.score is None:
        return config.assumed_score
    value = row[config.score]
    try:
        score = math.nan if isinstance(value, bool) else float(config.words.get(str(value), value))
    except (TypeError, ValueError):
        score = math.nan
    if not 0.5 <= score <= 1:  # not-a-number too
        raise LabelFileError(
            f"{where}: score {value!r} is neither a number from 0.5 to 1 nor a word that --score-words gives one"
        )
    return score
