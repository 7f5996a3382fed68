"""Labels on disk: `features.parquet` in a bundle's folder, a row for each labelled feature."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from turbolens_server.sae.bundle import BundleError

FILE_NAME: Final = "features.parquet"
_LABEL: Final = pa.struct(
    [("attribute", pa.string()), ("value", pa.string()), ("region", pa.string()), ("score", pa.float32())]
)
SCHEMA: Final = pa.schema(
    [("index", pa.int32()), ("label", pa.string()), ("label_score", pa.float32()), ("labels", pa.list_(_LABEL))]
)


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """One measured meaning of a feature."""

    attribute: str
    value: str
    region: str
    score: float
    """AUROC of the feature's activation for it; 0.5 is chance."""


@dataclasses.dataclass(frozen=True, slots=True)
class FeatureLabels:
    """What one feature stands for."""

    index: int
    label: str
    """In words; empty where nothing fits."""
    label_score: float
    labels: tuple[Label, ...]
    """Every meaning that was measured, best first."""


def write_labels(folder: Path, rows: Sequence[FeatureLabels]) -> None:
    """Write the labels of a bundle."""
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)
    pq.write_table(table, folder / FILE_NAME, compression="zstd")


def read_labels(folder: Path | None, d_sae: int) -> dict[int, FeatureLabels]:
    """The labels of a bundle by feature; none where the folder has no file.

    Raises:
        BundleError: the file is malformed.
    """
    if folder is None or not (folder / FILE_NAME).exists():
        return {}
    path = folder / FILE_NAME
    try:
        rows = pq.read_table(path).cast(SCHEMA).to_pylist()
        labels = {
            row["index"]: FeatureLabels(
                int(row["index"]),
                row["label"] or "",
                _score(row["label_score"] or 0.0),
                tuple(_label(**label) for label in row["labels"] or ()),
            )
            for row in rows
        }
    except Exception as error:  # pyarrow raises many kinds
        raise BundleError(f"{path}: unreadable ({str(error).splitlines()[0]})") from error
    if len(labels) < len(rows):
        raise BundleError(f"{path}: a feature has more than one row")
    if outside := [index for index in labels if not 0 <= index < d_sae]:
        raise BundleError(f"{path}: feature {outside[0]} is outside 0 to {d_sae - 1}")
    return labels


def _label(attribute: str | None, value: str | None, region: str | None, score: float | None) -> Label:
    if attribute is None or value is None or score is None:
        raise ValueError("a label lacks its attribute, value or score")
    return Label(attribute, value, region or "", _score(score))


def _score(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a score is {value}")
    return float(value)
