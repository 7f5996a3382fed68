"""`features.parquet`: what is known in words of each feature of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

_LABEL: Final = pa.struct(
    [("attribute", pa.string()), ("value", pa.string()), ("region", pa.string()), ("score", pa.float32())]
)
_SCHEMA: Final = pa.schema(
    [("index", pa.int32()), ("label", pa.string()), ("label_score", pa.float32()), ("labels", pa.list_(_LABEL))]
)
_FILE: Final = "features.parquet"


def write_labels(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the labels of a bundle's features, one row for each, by index."""
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=_SCHEMA), folder / _FILE)


def read_labels(folder: Path) -> list[dict[str, Any]]:
    """The rows of a bundle's `features.parquet`."""
    rows: list[dict[str, Any]] = pq.read_table(folder / _FILE).to_pylist()
    return rows
