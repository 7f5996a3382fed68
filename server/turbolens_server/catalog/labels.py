"""What is known of features on disk: `features.parquet` in a bundle's folder, a row for each feature.

Its one home: whoever measures, names or imports writes it here, and the server reads it here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from turbolens_server.files import first_line
from turbolens_server.sae.bundle import FEATURES_FILE, BundleError, amend_bundle

FILE_NAME: Final = FEATURES_FILE
_LABEL: Final = pa.struct(
    [("attribute", pa.string()), ("value", pa.string()), ("region", pa.string()), ("score", pa.float32())]
)
_EXAMPLE: Final = pa.struct(
    [
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("steps", pa.int32()),
        ("step", pa.int32()),
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("activation", pa.float32()),
    ]
)
_EXAMPLES: Final = pa.list_(_EXAMPLE)
_EFFECT: Final = pa.struct(
    [
        ("attribute", pa.string()),
        ("value", pa.string()),
        ("moved", pa.float32()),
        ("others_right", pa.float32()),
        ("strength", pa.float32()),
        ("rank", pa.int32()),
    ]
)
SCHEMA: Final = pa.schema(
    [
        ("index", pa.int32()),
        ("label", pa.string()),
        ("label_score", pa.float32()),
        ("labels", pa.list_(_LABEL)),
        ("examples", _EXAMPLES),
        ("effects", pa.list_(_EFFECT)),
        ("icon_strength", pa.float32()),
    ]
)
_OPTIONAL: Final = ("examples", "effects", "icon_strength")
"""Columns that a file need not have."""


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """One measured meaning of a feature."""

    attribute: str
    value: str
    region: str
    score: float
    """How well it fits, 0.5 being chance; `FeatureLabel.score` of the contract says what is measured."""


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Where a picture lifts a feature most: prompt, seed and steps make the picture again."""

    prompt: str
    seed: int
    steps: int
    """Steps that the picture was sampled in."""
    step: int
    """Step of the activation, from 0."""
    y: int
    """Row of the hook point's grid, from the top."""
    x: int
    """Column, from the left."""
    activation: float


@dataclasses.dataclass(frozen=True, slots=True)
class Effect:
    """What adding a feature does to pictures, together with those before it in a group that moves them to a value."""

    attribute: str
    value: str
    moved: float
    """Share of pictures of other values that are then nearest to this one, of all the attribute's values."""
    others_right: float
    """Share of the other attributes that are then still right."""
    strength: float
    """At which each was added, in its mean activation."""
    rank: int
    """Place in the group, from 1."""

    @property
    def score(self) -> float:
        """Moved, and nothing else broken: 0 to 1."""
        return self.moved * self.others_right


@dataclasses.dataclass(frozen=True, slots=True)
class FeatureLabels:
    """What one feature stands for."""

    index: int
    label: str
    """In words; empty where nothing fits."""
    label_score: float
    labels: tuple[Label, ...]
    """Every meaning that was measured, best first."""
    examples: tuple[Example, ...] = ()
    """The pictures that lift it most, strongest first, each picture once."""
    effects: tuple[Effect, ...] = ()
    """What adding it does, the largest effect first; none where it moves nothing, or nobody measured."""
    icon_strength: float | None = None
    """Of `replace` on the empty prompt, in its mean activation, at which something shows; None: nothing does, or nobody
    looked."""


def write_labels(folder: Path, rows: Sequence[FeatureLabels], **entries: Any) -> None:
    """Write what is known of a bundle's features, in place of what the folder had.

    Args:
        folder: the bundle.
        rows: one for each feature.
        entries: of the bundle's provenance, which tell of them; None removes one.

    Raises:
        WriteError: they cannot be written; those from before stay.
    """
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd")
    amend_bundle(folder, {FILE_NAME: content.getvalue().to_pybytes()}, **entries)


def read_labels(folder: Path | None, d_sae: int) -> dict[int, FeatureLabels]:
    """What is known of a bundle's features, by index; nothing where the folder has no file.

    Raises:
        BundleError: the file is malformed.
    """
    if folder is None or not (folder / FILE_NAME).exists():
        return {}
    path = folder / FILE_NAME
    try:
        table = pq.ParquetFile(path).read()  # not read_table, which imports pandas where it is installed
        for name in _OPTIONAL:  # a file of labels alone
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
        _check_types(table.schema)
        rows = table.cast(SCHEMA).to_pylist()
        labels = {
            row["index"]: FeatureLabels(
                int(row["index"]),
                row["label"] or "",
                _score(row["label_score"] or 0.0),
                tuple(_label(**label) for label in row["labels"] or ()),
                tuple(_example(**example) for example in row["examples"] or ()),
                tuple(_effect(**effect) for effect in row["effects"] or ()),
                None if row["icon_strength"] is None else _score(row["icon_strength"]),
            )
            for row in rows
        }
    except Exception as error:  # pyarrow raises many kinds
        raise BundleError(f"{path}: unreadable ({first_line(error)})") from error
    if len(labels) < len(rows):
        raise BundleError(f"{path}: a feature has more than one row")
    if outside := [index for index in labels if not 0 <= index < d_sae]:
        raise BundleError(f"{path}: feature {outside[0]} is outside 0 to {d_sae - 1}")
    return labels


def _check_types(found: pa.Schema) -> None:
    """A cast would make texts of numbers, and numbers of texts."""
    of = pa.types
    for name, fits in (("index", (of.is_integer,)), ("label", (of.is_string, of.is_large_string))):
        if not any(fit(found.field(name).type) for fit in fits):
            raise ValueError(f"column {name!r} is of {found.field(name).type}")


def _label(attribute: str | None, value: str | None, region: str | None, score: float | None) -> Label:
    if attribute is None or value is None or score is None:
        raise ValueError("a label lacks its attribute, value or score")
    return Label(attribute, value, region or "", _score(score))


def _example(prompt: str | None, activation: float | None, **at: int | None) -> Example:
    numbers = {name: value for name, value in at.items() if value is not None and value >= 0}
    if prompt is None or activation is None or len(numbers) < len(at):
        raise ValueError("an example lacks its prompt, place or activation")
    return Example(prompt=prompt, activation=_score(activation), **numbers)


def _effect(attribute: str | None, value: str | None, rank: int | None, **numbers: float | None) -> Effect:
    measured = {name: _score(number) for name, number in numbers.items() if number is not None}
    if attribute is None or value is None or rank is None or len(measured) < len(numbers):
        raise ValueError("an effect lacks its attribute, value or a number")
    return Effect(attribute, value, **measured, rank=rank)


def _score(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a score or activation is {value}")
    return float(value)
