"""Top examples: the pictures, and the places in them, that lift each feature most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from turbolens_server.catalog.labels import Example
from turbolens_server.sae.sae import Codes
from turbolens_training.activations.stream import Updates

Ints = npt.NDArray[np.int64]


def strongest(groups: Ints, values: npt.NDArray[np.float32], keep: int) -> Ints:
    """Indices of the `keep` largest values of each group, by group, then falling; of equals the first come first.

    Args:
        groups: [E].
        values: [E].
        keep: entries of a group, at most.
    """
    order = np.lexsort((-values, groups))  # stable
    ordered = groups[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return order[rank < keep]


class TopExamples:
    """The strongest examples of every feature of one SAE, each of another picture, over batches in any number."""

    def __init__(self, d_sae: int, keep: int, grid: tuple[int, int]) -> None:
        """Start with none.

        Args:
            d_sae: features.
            keep: examples of a feature, at most.
            grid: rows and columns of the hook point.
        """
        self._d_sae, self._keep, self._columns = d_sae, keep, grid[1]
        self._features: Ints = np.zeros(0, np.int64)  # [E], rising
        self._values: npt.NDArray[np.float32] = np.zeros(0, np.float32)  # [E], falling within a feature
        self._at: Ints = np.zeros((0, 3), np.int64)  # [E, (picture, step, position)]
        self._pictures: list[tuple[str, int, int]] = []  # prompt, seed, steps

    def add(self, updates: Updates, codes: Sequence[Codes]) -> None:
        """Take in a batch's updates, and their codes [N, P, K] at each step, or once, at the last."""
        first, steps = len(self._pictures), len(updates.timesteps)
        self._pictures += [(p, s, steps) for p, s in zip(updates.captions, updates.seeds, strict=True)]
        features, values, at = [self._features], [self._values], [self._at]
        for step, found in enumerate(codes, start=steps - len(codes)):
            strengths = found.values.cpu().numpy()
            active = strengths > 0
            image, position, _ = active.nonzero()
            features.append(found.indices.cpu().numpy()[active])
            values.append(strengths[active])
            at.append(np.stack([first + image, np.full_like(image, step), position], 1))
        self._features, self._values, self._at = np.concatenate(features), np.concatenate(values), np.concatenate(at)
        # Of each picture a feature's strongest place alone; then of each feature its strongest pictures.
        self._keep_only(strongest(self._features * len(self._pictures) + self._at[:, 0], self._values, 1))
        self._keep_only(strongest(self._features, self._values, self._keep))

    def _keep_only(self, entries: Ints) -> None:
        self._features, self._values, self._at = self._features[entries], self._values[entries], self._at[entries]

    def examples(self) -> list[tuple[Example, ...]]:
        """Those of every feature, strongest first."""
        found: list[list[Example]] = [[] for _ in range(self._d_sae)]
        for feature, value, (picture, step, position) in zip(
            self._features.tolist(), self._values.tolist(), self._at.tolist(), strict=True
        ):
            prompt, seed, steps = self._pictures[picture]
            y, x = divmod(position, self._columns)
            found[feature].append(Example(prompt, seed, steps, step, y, x, value))
        return [tuple(examples) for examples in found]
