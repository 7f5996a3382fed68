"""What fires behind a picture."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from turbolens._edits import FeatureLike, FeatureRef, to_ref
from turbolens._heatmap import overlay
from turbolens._numbers import whole
from turbolens_proto.v1 import feature_service_pb2, run_pb2

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class HasImage(Protocol):
    """A picture of ours."""

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        ...


LabelsOf = Callable[[str], Mapping[int, str]]
"""The labels of an SAE, by feature."""


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """One measured meaning of a feature."""

    attribute: str
    value: str
    region: str
    score: float
    """How well it fits, 0.5 being chance; `FeatureLabel.score` in `turbolens/v1/feature_service.proto` says what is
    measured."""


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Where a picture lifts a feature: `lens.generate(e.prompt, seed=e.seed, steps=e.steps)` makes it again."""

    prompt: str
    seed: int
    steps: int
    """Steps that the picture was sampled in."""
    step: int
    """Step of the activation, from 0."""
    y: int
    """Row of the block's grid, from the top."""
    x: int
    """Column, from the left."""
    activation: float


@dataclasses.dataclass(frozen=True, slots=True)
class Feature:
    """What is known of one feature."""

    ref: FeatureRef
    label: str
    """In words; empty where nothing fits."""
    label_score: float
    """Score of the label, see :class:`Label`; 0.5 is chance, 0 stands for no label."""
    frequency: float
    """Share of positions where it is active."""
    mean: float
    """Mean activation where it is active: what strength 1 means."""
    max: float
    labels: tuple[Label, ...]
    examples: tuple[Example, ...] = ()
    """The pictures that lift it most, strongest first; from `get_feature` alone."""

    @classmethod
    def from_proto(cls, message: feature_service_pb2.Feature) -> Feature:
        """From the server's message."""
        labels = tuple(Label(lb.attribute, lb.value, lb.region, lb.score) for lb in message.labels)
        examples = tuple(Example(e.prompt, e.seed, e.steps, e.step, e.y, e.x, e.activation) for e in message.examples)
        ref = FeatureRef(message.ref.sae, message.ref.index)
        return cls(
            ref, message.label, message.label_score, message.frequency, message.mean, message.max, labels, examples
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A feature found by words; goes straight into an edit."""

    feature: Feature
    score: float
    """How well it answers the words, 0 to 1; `FeatureMatch.score` in the same file says how it is made."""
    reason: str
    """By which label, and how."""

    @property
    def ref(self) -> FeatureRef:
        """The feature."""
        return self.feature.ref


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """A feature near to another; goes straight into an edit."""

    feature: Feature
    cosine: float
    """Of the two decoder directions, -1 to 1."""

    @property
    def ref(self) -> FeatureRef:
        """The feature."""
        return self.feature.ref


class Table(list[Any]):
    """A list of rows that notebooks show as a table."""

    def __init__(self, rows: Sequence[Any], columns: Sequence[str]) -> None:
        super().__init__(rows)
        self._paths = tuple(columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(path.rpartition(".")[2] for path in self._paths)

    def values(self) -> list[list[Any]]:
        """What stands in each row, in order of the columns."""
        return [[functools.reduce(getattr, path.split("."), row) for path in self._paths] for row in self]

    def cells(self) -> list[list[str]]:
        """The same as text."""
        return [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in self.values()]

    def _repr_html_(self) -> str:
        names = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.cells())
        return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        rows = [self.columns, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@dataclasses.dataclass(frozen=True, slots=True)
class TopFeature:
    """A row of :meth:`BlockFeatures.top`."""

    ref: FeatureRef
    mean: float
    """Mean activation over steps and positions, zeros counted."""
    label: str

    @property
    def feature(self) -> int:
        """Its index."""
        return self.ref.index


class BlockFeatures:
    """The features of one SAE in one run; the leading axis is the step."""

    def __init__(self, chunks: Sequence[run_pb2.SparseFeatures], labels: Mapping[int, str]) -> None:
        first = chunks[0]
        self.sae = first.sae
        self.steps = tuple(chunk.step for chunk in chunks)
        self.height, self.width, self.d_sae = first.height, first.width, first.d_sae
        self._labels = labels
        rows, indices, values = [], [], []
        cells = self.height * self.width
        for at, chunk in enumerate(chunks):
            counts = np.frombuffer(chunk.counts, "<u2")
            rows.append(np.repeat(np.arange(at * cells, (at + 1) * cells), counts))
            indices.append(np.frombuffer(chunk.indices, "<u2" if chunk.d_sae <= 2**16 else "<u4").astype(np.int64))
            half = chunk.value_type != run_pb2.VALUE_TYPE_FLOAT32
            values.append(np.frombuffer(chunk.values, "<f2" if half else "<f4").astype(np.float32))
        self.rows: npt.NDArray[np.int64] = np.concatenate(rows)
        """[n] step * height * width + position, of every activation."""
        self.indices: npt.NDArray[np.int64] = np.concatenate(indices)
        """[n] feature."""
        self.values: npt.NDArray[np.float32] = np.concatenate(values)
        """[n] activation, all positive."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(steps, height, width, d_sae)."""
        return len(self.steps), self.height, self.width, self.d_sae

    def top(self, n: int = 10) -> Table:
        """The `n` features with the largest mean activation over steps and positions, zeros counted."""
        cells = len(self.steps) * self.height * self.width
        mean = np.bincount(self.indices, weights=self.values, minlength=self.d_sae) / cells
        best = [int(i) for i in np.argsort(-mean, kind="stable")[:n] if mean[i] > 0]
        rows = [TopFeature(FeatureRef(self.sae, i), float(mean[i]), self._labels.get(i, "")) for i in best]
        return Table(rows, ("feature", "mean", "label"))

    def _index(self, feature: int | FeatureLike) -> int:
        if hasattr(type(feature), "__index__"):
            index = whole(feature, "a feature's index")
        else:
            ref = to_ref(cast(FeatureLike, feature))
            if ref.sae != self.sae:
                raise KeyError(f"{ref} is no feature of {self.sae}")
            index = ref.index
        if not 0 <= index < self.d_sae:
            raise IndexError(f"{self.sae} has features 0 to {self.d_sae - 1}, not {index}")
        return index

    def heatmap(self, feature: int | FeatureLike) -> npt.NDArray[np.float32]:
        """Activation of one feature at each position, mean over steps, zeros counted: [height, width].

        Args:
            feature: its index, or a row of :meth:`top`, a search result or a reference of this SAE.
        """
        index = self._index(feature)
        hit = self.indices == index
        cells = self.height * self.width
        total = np.bincount(self.rows[hit] % cells, weights=self.values[hit], minlength=cells)
        return (total / len(self.steps)).reshape(self.height, self.width).astype(np.float32)

    def at(self, step: int) -> BlockFeatures:
        """The features of one step."""
        if step not in self.steps:
            raise IndexError(f"{self.sae} has steps {list(self.steps)}, not {step}")
        place, cells = self.steps.index(step), self.height * self.width
        own = self.rows // cells == place
        picked = object.__new__(BlockFeatures)
        picked.__dict__.update(
            {**self.__dict__, "steps": (step,), "rows": self.rows[own] - place * cells,
             "indices": self.indices[own], "values": self.values[own]}
        )  # fmt: skip
        return picked

    def to_dense(self) -> npt.NDArray[np.float32]:
        """Every activation, [steps, height, width, d_sae]."""
        dense = np.zeros((len(self.steps) * self.height * self.width, self.d_sae), np.float32)
        dense[self.rows, self.indices] = self.values
        return dense.reshape(self.shape)

    def overlay(self, feature: int | FeatureLike, picture: Image.Image | HasImage) -> Image.Image:
        """The heat-map of a feature over a picture, ours or PIL's."""
        return overlay(self.heatmap(feature), picture.image if isinstance(picture, HasImage) else picture)

    def _repr_html_(self) -> str:
        return self.top()._repr_html_()

    def __repr__(self) -> str:
        return f"BlockFeatures({self.sae!r}, shape={self.shape}, active={len(self.values)})"


class RunFeatures(Mapping[str, BlockFeatures]):
    """The features of one run, by SAE: `features["down.2.1"].top(10)`."""

    def __init__(self, seed: int, chunks: Sequence[run_pb2.SparseFeatures], labels_of: LabelsOf) -> None:
        self.seed = seed
        by_sae: dict[str, list[run_pb2.SparseFeatures]] = {}
        for chunk in chunks:
            by_sae.setdefault(chunk.sae, []).append(chunk)
        self._blocks = {sae: BlockFeatures(own, labels_of(sae)) for sae, own in by_sae.items()}

    def __getitem__(self, sae: str) -> BlockFeatures:
        if sae not in self._blocks:
            raise KeyError(f"{sae!r}; this run has {', '.join(self._blocks) or 'no features'}")
        return self._blocks[sae]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{html.escape(sae)}</h4>{block._repr_html_()}" for sae, block in self._blocks.items())

    def __repr__(self) -> str:
        return f"RunFeatures(seed={self.seed}, saes={list(self._blocks)})"
