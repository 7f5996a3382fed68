"""How thousands of sparse features tell two groups of units apart, all at once and exactly, ties included."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Active:
    """The positive activations of a population of units (cells, things, pictures); all others are zero."""

    units: Tensor  # [E] int64
    features: Tensor  # [E] int64
    values: Tensor  # [E] float, > 0
    count: int
    """Units in the population."""


def pool(active: Active, into: Tensor, count: int) -> Active:
    """Mean activation over larger units.

    Args:
        active: activations of cells.
        into: for each cell the larger unit that it belongs to, [cells] int64; -1 for none.
        count: larger units.
    """
    inside = into[into >= 0]
    sizes = torch.bincount(inside, minlength=count)
    keep = into[active.units] >= 0
    units, features = into[active.units[keep]], active.features[keep]
    stride = int(features.max()) + 1 if len(features) else 1
    unique, inverse = np.unique((units * stride + features).numpy(), return_inverse=True)
    keys, entry = torch.from_numpy(unique), torch.from_numpy(inverse)
    sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, entry, active.values[keep].double())
    owners = keys // stride
    return Active(owners, keys % stride, sums / sizes[owners], count)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Positive against negative units, by feature; each [d_sae] float64."""

    auroc: Tensor
    """Chance that a random positive unit has a larger activation than a random negative one, a tie counting half."""
    z: Tensor
    """How many standard deviations that is from chance, by the Mann-Whitney test with its correction for ties."""
    selectivity: Tensor
    """Share of the activation that falls on positive units, were there as many of them as of negative ones."""


class Ranking:
    """A population's activations in order, to score many splits of it."""

    def __init__(self, active: Active, d_sae: int) -> None:
        order = active.values.argsort(stable=True)
        order = order[active.features[order].argsort(stable=True)]
        self._units = active.units[order]
        self._d_sae = d_sae
        features, values = active.features[order], active.values[order].double()
        self._features, self._values = features, values
        # A tie is a run of equal values of one feature.
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = (features[1:] != features[:-1]) | (values[1:] != values[:-1])
        self._tie = new.cumsum(0) - 1  # [E], the tie that each entry is in
        self._feature = features[new]  # [ties], falling in order of feature, then of value

    def active_units(self, among: Tensor) -> Tensor:
        """Units of `among` [count] bool at which each feature is active, [d_sae]."""
        ties = self._per_tie(among)
        return torch.zeros(self._d_sae, dtype=torch.float64).index_add_(0, self._feature, ties)

    def _per_tie(self, among: Tensor) -> Tensor:
        return torch.zeros(len(self._feature), dtype=torch.float64).index_add_(
            0, self._tie, among[self._units].double()
        )

    def compare(self, positive: Tensor, negative: Tensor) -> Comparison:
        """Compare positive [count] bool with negative [count] bool units, which are disjoint; others take no part.

        AUROC asks for recall as much as for precision: a feature that fires on one in ten blue things, and on nothing
        else, has 0.55 and a large z; its selectivity is 1.
        """
        total_pos, total_neg = float(positive.sum()), float(negative.sum())
        zeros = torch.zeros(self._d_sae, dtype=torch.float64)
        if not total_pos or not total_neg:
            return Comparison(zeros + 0.5, zeros, zeros + 0.5)
        pos, neg = self._per_tie(positive), self._per_tie(negative)  # [ties]
        silent_pos = total_pos - zeros.index_add(0, self._feature, pos)  # [d_sae], positives at zero
        active_neg = zeros.index_add(0, self._feature, neg)
        silent_neg = total_neg - active_neg
        # Negatives below each tie: the silent ones, and those of the same feature's smaller ties.
        before_feature = active_neg.cumsum(0) - active_neg
        below = neg.cumsum(0) - neg - before_feature[self._feature] + silent_neg[self._feature]
        wins = (0.5 * silent_pos * silent_neg).index_add(0, self._feature, pos * (below + 0.5 * neg))
        pairs, total = total_pos * total_neg, total_pos + total_neg

        size, silent = pos + neg, silent_pos + silent_neg
        tied = (silent**3 - silent).index_add(0, self._feature, size**3 - size)
        spread = (pairs / 12 * (total + 1 - tied / (total * (total - 1)))).clamp(min=0).sqrt()
        z = torch.where(spread > 0, (wins - pairs / 2) / spread.clamp(min=1e-12), 0.0)

        on_pos, on_neg = (self._sum(units) / n for units, n in ((positive, total_pos), (negative, total_neg)))
        selectivity = torch.where(on_pos + on_neg > 0, on_pos / (on_pos + on_neg).clamp(min=1e-300), 0.5)
        return Comparison(wins / pairs, z, selectivity)

    def _sum(self, among: Tensor) -> Tensor:
        """Each feature's activation over the units of `among`, [d_sae]."""
        zeros = torch.zeros(self._d_sae, dtype=torch.float64)
        return zeros.index_add(0, self._features, self._values * among[self._units])
