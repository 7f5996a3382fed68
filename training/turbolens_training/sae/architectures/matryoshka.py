"""Matryoshka: one dictionary whose prefixes are dictionaries (Bussmann et al. 2025, arXiv 2503.17547), and whose k is
chosen when it is served (Zaigrajew et al. 2025, arXiv 2502.20578)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from turbolens_server.sae.bundle import Nesting, SaeWeights
from turbolens_training.sae.architectures.base import Export, SaeArchitecture
from turbolens_training.sae.config import LevelWeights
from turbolens_training.sae.maths import Active, reconstruction_loss, top_k


@dataclasses.dataclass(frozen=True)
class Matryoshka(SaeArchitecture):
    """TopK at several k, and of the first m features alone at several m, each a reconstruction of its own.

    A prefix selects among its own features, so that it is, weights and all, the TopK SAE of its size: a general
    feature cannot be kept out by a special one that comes later.
    """

    k: int
    """Of every prefix, and where a request says nothing."""
    ks: tuple[int, ...]
    """The other k of the whole dictionary."""
    prefixes: tuple[int, ...]
    """Sizes of the prefixes, without the whole."""
    level_weights: LevelWeights = "uniform"

    def encode(self, weights: SaeWeights, pre: Tensor) -> Active:
        return top_k(pre, self.k)

    def loss(self, weights: SaeWeights, x: Tensor, pre: Tensor, active: Active, reconstruction: Tensor) -> Tensor:
        """Mean FVU of the default, of the other k, and of the prefixes, by the weights of the levels."""
        others = [top_k(pre, k) for k in self.ks]
        others += [top_k(pre[:, :width], self.k) for width in self.prefixes]
        losses = [reconstruction_loss(x, self.decode(weights, other)) for other in others]
        shares = torch.tensor(self.shares(), device=x.device)
        return (torch.stack([reconstruction_loss(x, reconstruction), *losses]) * shares).sum()

    def shares(self) -> list[float]:
        """Of the levels in the loss: of the default, the other k and the prefixes; they add up to 1.

        Reverse, as the authors of arXiv 2502.20578 weigh: of n rising k the first weighs n and the last 1. Prefixes
        are weighed likewise, the whole being the last.
        """
        levels = [1.0] * (1 + len(self.ks) + len(self.prefixes))
        if self.level_weights == "reverse":
            every = (self.k, *self.ks)
            levels = [float(sum(other >= k for other in every)) for k in every]
            levels += [float(sum(other >= width for other in self.prefixes) + 1) for width in self.prefixes]
        return [level / sum(levels) for level in levels]

    def export(self, weights: SaeWeights) -> Export:
        d_sae = weights.W_enc.shape[1]
        nesting = Nesting(max((self.k, *self.ks)), (*self.prefixes, d_sae))
        return Export("turbolens-matryoshka", self.k, weights, nesting)
