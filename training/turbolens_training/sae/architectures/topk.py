"""TopK (Gao et al. 2024, arXiv 2406.04093), as the published SAEs of SDXL Turbo are."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae.architectures.base import Export, Pass, SaeArchitecture
from turbolens_training.sae.maths import Active, reconstruction_loss, top_k, top_k_loss


@dataclasses.dataclass(frozen=True)
class TopK(SaeArchitecture):
    """The k largest pre-activations of every position."""

    k: int

    def encode(self, weights: SaeWeights, pre: Tensor) -> Active:
        return top_k(pre, self.k)

    def loss(self, weights: SaeWeights, x: Tensor, pre: Tensor, active: Active, reconstruction: Tensor) -> Tensor:
        return reconstruction_loss(x, reconstruction)

    def run(self, weights: SaeWeights, x: Tensor) -> Pass:
        if x.is_cuda:
            return super().run(weights, x)
        loss, pre, active, error = top_k_loss(weights, x, self.k)
        return Pass(pre, active, error, loss)

    def export(self, weights: SaeWeights) -> Export:
        return Export("topk", self.k, weights)
