"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): k on average, more where a picture needs more."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Generator, Tensor

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae.architectures.base import Export, Pass, SaeArchitecture
from turbolens_training.sae.maths import Active, reconstruction_loss, starts

THRESHOLD_DECAY: Final = 0.99
"""Of the running mean of the batches' smallest selected activation."""


def batch_top_k(pre: Tensor, k: int) -> Active:
    """The N k largest positive parts of a whole batch of pre-activations [N, d_sae], in order of position."""
    positions, d_sae = pre.shape
    values, flat = pre.relu().flatten().topk(positions * k, sorted=False)
    flat, order = flat.sort()
    return Active(values[order], flat % d_sae, starts((flat // d_sae).bincount(minlength=positions)))


@dataclasses.dataclass(frozen=True)
class BatchTopK(SaeArchitecture):
    """The N k largest activations of a batch of N positions in training; a threshold where it is served.

    What a position gets must not depend on its batch mates once it is served. So the smallest activation that
    training selected, averaged over batches, is the threshold of a JumpReLU with the same mean L0.
    """

    k: int

    def initial_weights(self, tokens: Tensor, d_sae: int, generator: Generator) -> SaeWeights:
        weights = super().initial_weights(tokens, d_sae, generator)
        # Negative: not yet observed. One number for all features, stored for each as JumpReLU has it.
        return dataclasses.replace(weights, threshold=torch.full_like(weights.b_enc, -1.0))

    def trainable(self, weights: SaeWeights) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.tensors().items() if name != "threshold"}

    def encode(self, weights: SaeWeights, pre: Tensor) -> Active:
        return batch_top_k(pre, self.k)

    def loss(self, weights: SaeWeights, x: Tensor, pre: Tensor, active: Active, reconstruction: Tensor) -> Tensor:
        return reconstruction_loss(x, reconstruction)

    def observe(self, weights: SaeWeights, done: Pass) -> None:
        threshold, values = weights.threshold, done.active.values
        assert threshold is not None
        smallest = values.masked_fill(values <= 0, torch.inf).amin()
        running = THRESHOLD_DECAY * threshold + (1 - THRESHOLD_DECAY) * smallest
        updated = torch.where(threshold < 0, smallest, running)
        threshold.copy_(torch.where(smallest.isfinite(), updated, threshold))

    def export(self, weights: SaeWeights) -> Export:
        threshold = weights.threshold
        assert threshold is not None
        return Export("jumprelu", None, dataclasses.replace(weights, threshold=threshold.clamp(min=0)))
