"""Temporal: features of what changes from one denoising step to the next, over a whole run of a fixed length."""

from __future__ import annotations

import dataclasses

import torch
from torch import Generator, Tensor

from turbolens_server.sae.bundle import SaeWeights
from turbolens_server.sae.temporal import changes
from turbolens_training.sae.architectures.base import Export
from turbolens_training.sae.architectures.topk import TopK


@dataclasses.dataclass(frozen=True)
class Temporal(TopK):
    """The k largest pre-activations of the changes of a whole run, at every position.

    `turbolens_server.sae.temporal` has the algebra. The changes of every step get unit variance, once and for all from
    the first tokens: on the embedded model the later ones have less than a hundredth of the first update's variance,
    and without a unit of their own no feature would learn them.
    """

    steps: int
    """T, of a run; tokens are the updates of its steps side by side, [N, T * d_model]."""

    def initial_weights(self, tokens: Tensor, d_sae: int, generator: Generator) -> SaeWeights:
        ones = torch.ones(self.steps, device=tokens.device)
        squares = changes(tokens, ones).double().square().mean(0).unflatten(0, (self.steps, -1)).mean(1)
        scales = torch.where(squares > 0, squares.sqrt(), 1.0).float()
        return dataclasses.replace(
            super().initial_weights(changes(tokens, scales), d_sae, generator), scales=scales.detach()
        )

    def trainable(self, weights: SaeWeights) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.tensors().items() if name != "scales"}

    def read(self, weights: SaeWeights, x: Tensor) -> Tensor:
        if weights.scales is None:
            raise ValueError("a temporal SAE has scales")
        return changes(x, weights.scales)

    def export(self, weights: SaeWeights) -> Export:
        return Export("turbolens-temporal", self.k, weights)
