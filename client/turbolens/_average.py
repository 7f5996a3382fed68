"""Features of several runs as one, with their spread: such as those of one picture under several noises."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from turbolens._blocks import BlockFeatures
from turbolens._edits import FeatureLike, FeatureRef
from turbolens._table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class AverageFeature:
    """A row of :meth:`Average.top`."""

    ref: FeatureRef
    mean: float
    """Over the runs, of the mean activation over steps and positions, zeros counted."""
    spread: float
    """Standard deviation of that between the runs."""
    share: float
    """Of the runs in which it is active anywhere."""
    label: str


class Average:
    """The features of one SAE over several runs."""

    def __init__(self, runs: Sequence[BlockFeatures]) -> None:
        self.sae, self.d_sae = runs[0].sae, runs[0].d_sae
        self._runs = tuple(runs)
        each = np.stack([run.means() for run in runs])  # [runs, d_sae]
        self.mean: npt.NDArray[np.float64] = each.mean(0)
        """[d_sae], see :class:`AverageFeature`."""
        self.spread: npt.NDArray[np.float64] = each.std(0, ddof=1) if len(runs) > 1 else np.zeros(self.d_sae)
        """[d_sae]; 0 of a single run."""
        self.share: npt.NDArray[np.float64] = (each > 0).mean(0)
        """[d_sae]"""

    def __len__(self) -> int:
        return len(self._runs)

    def top(self, n: int = 10) -> Table:
        """The `n` features with the largest mean."""
        best = [int(i) for i in np.argsort(-self.mean, kind="stable")[:n] if self.mean[i] > 0]
        rows = [
            AverageFeature(
                FeatureRef(self.sae, i), float(self.mean[i]), float(self.spread[i]), float(self.share[i]),
                self._runs[0]._labels.get(i, ""),
            )
            for i in best
        ]  # fmt: skip
        return Table(rows, ("ref", "mean", "spread", "share", "label"))

    def heatmap(self, feature: int | FeatureLike) -> npt.NDArray[np.float32]:
        """Mean activation of one feature over runs and steps, [height, width]."""
        mean: npt.NDArray[np.float32] = np.mean([run.heatmap(feature) for run in self._runs], axis=0, dtype=np.float32)
        return mean

    def __repr__(self) -> str:
        return f"Average({self.sae!r}, runs={len(self)})"


def average(runs: Sequence[Mapping[str, BlockFeatures]]) -> dict[str, Average]:
    """Features of several runs as one, by SAE, such as of `lens.extract(prompt, image=photo, ..., seeds=range(8))`.

    Raises:
        ValueError: there is no run, or they do not have the same SAEs, steps and size.
    """
    if not runs:
        raise ValueError("average: no runs")
    shapes = [{name: block.shape for name, block in run.items()} for run in runs]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("average: the runs differ in their SAEs, steps or size")
    return {name: Average([run[name] for run in runs]) for name in runs[0]}
