"""What the trainer needs of an SAE's architecture, and nothing of how it selects features."""

from __future__ import annotations

import abc
import dataclasses
from typing import Final

from torch import Generator, Tensor

from turbolens_server.sae.bundle import Architecture, Nesting, SaeWeights
from turbolens_training.sae.maths import Active, best_scale, decode, initial_weights, pre_activations

LOOK: Final = 2048
"""Tokens from which the scale to start at is taken, and a first threshold."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One batch through an SAE in training."""

    pre: Tensor  # [N, d_sae] pre-activations
    active: Active
    error: Tensor  # [N, d_model] the reconstruction without x, without a gradient
    loss: Tensor  # scalar; AuxK, which is the same for every architecture, comes on top


@dataclasses.dataclass(frozen=True)
class Export:
    """A trained SAE as it is served."""

    architecture: Architecture
    k: int | None
    weights: SaeWeights
    nesting: Nesting | None = None


class SaeArchitecture(abc.ABC):
    """How activations are selected, and by which loss that is learnt.

    An architecture holds settings only. Everything that changes in training is in the weights that it is given, so
    that one checkpoint of the weights is a checkpoint of the whole SAE. Updates are normalised: centred, and of unit
    variance per dimension.
    """

    def initial_weights(self, tokens: Tensor, d_sae: int, generator: Generator) -> SaeWeights:
        """Weights to start from, for normalised updates [N, d_model]; `generator` is of the CPU.

        Rows that point to tokens reconstruct them several times too large, so the encoder starts at the best scale.
        """
        weights = initial_weights(tokens, d_sae, generator)
        x = tokens[:LOOK]
        made = self.decode(weights, self.encode(weights, pre_activations(weights, x)))
        return dataclasses.replace(weights, W_enc=weights.W_enc * best_scale(x, made))

    def trainable(self, weights: SaeWeights) -> dict[str, Tensor]:
        """The tensors that gradients change, by name."""
        return weights.tensors()

    def read(self, weights: SaeWeights, x: Tensor) -> Tensor:
        """What is encoded and reconstructed of normalised updates x [N, d_in], linear in them: as a rule, x itself.

        All that follows takes x as it is read.
        """
        return x

    @abc.abstractmethod
    def encode(self, weights: SaeWeights, pre: Tensor) -> Active:
        """Select activations from pre-activations [N, d_sae], as in training."""

    def decode(self, weights: SaeWeights, active: Active) -> Tensor:
        """Reconstruct normalised updates, [N, d_model]."""
        return decode(active, weights.W_dec) + weights.b_dec

    @abc.abstractmethod
    def loss(self, weights: SaeWeights, x: Tensor, pre: Tensor, active: Active, reconstruction: Tensor) -> Tensor:
        """What is minimised for updates x [N, d_model], but for AuxK: a scalar."""

    def run(self, weights: SaeWeights, x: Tensor) -> Pass:
        """Encode, decode and judge normalised updates x [N, d_model]."""
        pre = pre_activations(weights, x)
        active = self.encode(weights, pre)
        reconstruction = self.decode(weights, active)
        error = (reconstruction - x).detach()
        return Pass(pre, active, error, self.loss(weights, x, pre, active, reconstruction))

    def observe(self, weights: SaeWeights, done: Pass) -> None:  # noqa: B027  (most have no statistics)
        """Take statistics of a training batch into the weights, in place; called without gradients."""

    @abc.abstractmethod
    def export(self, weights: SaeWeights) -> Export:
        """What is served for weights that are already folded onto updates as the U-Net makes them."""
