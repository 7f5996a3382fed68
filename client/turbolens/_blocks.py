"""What fires behind a picture, SAE by SAE."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from turbolens._edits import FeatureLike, FeatureRef, Mask, to_ref
from turbolens._heatmap import overlay
from turbolens._numbers import whole
from turbolens._regions import located
from turbolens._start import HasImage
from turbolens._table import Table, to_arrow, to_pandas
from turbolens_proto.v1 import run_pb2

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from PIL import Image

LabelsOf = Callable[[str], Mapping[int, str]]
"""The labels of an SAE, by feature."""


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

    def means(self) -> npt.NDArray[np.float64]:
        """Mean activation of every feature over steps and positions, zeros counted, [d_sae]."""
        steps, height, width, d_sae = self.shape
        total = np.bincount(self.indices, weights=self.values, minlength=d_sae)
        return np.asarray(total / (steps * height * width), np.float64)

    def top(self, n: int = 10) -> Table:
        """The `n` features with the largest mean activation over steps and positions, zeros counted."""
        mean = self.means()
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

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Every activation as a row of equally long columns: step, y, x (cells of the grid), feature, activation."""
        cells = self.height * self.width
        steps = np.asarray(self.steps, np.int64)
        y, x = np.divmod(self.rows % cells, self.width)
        return {"step": steps[self.rows // cells], "y": y, "x": x, "feature": self.indices, "activation": self.values}

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`columns` as a data frame; needs pandas."""
        return to_pandas(self.columns())

    def to_arrow(self) -> pyarrow.Table:
        """:meth:`columns` as an Arrow table; needs pyarrow."""
        return to_arrow(self.columns())

    def overlay(
        self, feature: int | FeatureLike, picture: Image.Image | HasImage, *, smooth: bool = True, scale: bool = False
    ) -> Image.Image:
        """The heat-map of a feature over a picture, ours or PIL's.

        Args:
            feature: as for :meth:`heatmap`.
            picture: what to lay it on.
            smooth: between the cells of the grid; False: the cells as they are.
            scale: add a strip below that says what the colours are.
        """
        under = picture.image if isinstance(picture, HasImage) else picture
        return overlay(self.heatmap(feature), under, smooth=smooth, scale=scale)

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

    def inside(self, mask: Mask, *, limit: int = 10, sae: str | None = None) -> Table:
        """The features that a region has more of than the rest of the picture, those that tell it best first.

        Args:
            mask: the region, such as `box(0, 0, 0.5, 0.5)`; a cell of the grid that it covers by half is in it.
            limit: at most so many.
            sae: only of this SAE; None: of all.

        Returns:
            A list of :class:`Located`; its rows go straight into an edit.

        Raises:
            ValueError: the region covers no cell of a grid, or all of them.
        """
        blocks = self.values() if sae is None else [self[sae]]
        rows = [row for block in blocks for row in located(block.sae, block.to_dense(), block._labels, mask)]
        rows.sort(key=lambda row: (-row.effect, row.outside - row.inside))
        return Table(rows[:limit], ("ref", "label", "effect", "inside", "outside"))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Every activation of every SAE, as :meth:`BlockFeatures.columns` has them, and the SAE."""
        parts = [{"sae": np.full(len(block.values), sae), **block.columns()} for sae, block in self.items()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`columns` as a data frame; needs pandas."""
        return to_pandas(self.columns())

    def to_arrow(self) -> pyarrow.Table:
        """:meth:`columns` as an Arrow table; needs pyarrow."""
        return to_arrow(self.columns())

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{html.escape(sae)}</h4>{block._repr_html_()}" for sae, block in self._blocks.items())

    def __repr__(self) -> str:
        return f"RunFeatures(seed={self.seed}, saes={list(self._blocks)})"
