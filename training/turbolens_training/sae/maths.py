"""The maths that SAEs of every architecture share, as pure functions: encode, select, decode, and the losses.

The slow, readable twin of everything here is :mod:`turbolens_training.sae.reference`.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import SaeWeights

DATA_SHARE: Final = 4 / 3
"""How much of a first decoder row is a token, to 1 of noise: 0.8 of it, once normalised."""


@dataclasses.dataclass(frozen=True)
class Active:
    """The selected activations of a batch of N positions, ragged: an architecture need not select k at each."""

    values: Tensor  # [M] float32, >= 0
    features: Tensor  # [M] int64, of the first position, then of the second, ...
    offsets: Tensor  # [N] int64, where each position begins

    def counts(self, d_sae: int) -> Tensor:
        """Positions at which each feature is active, [d_sae] int64."""
        # Not bincount: that waits for the device, to learn how long its answer is.
        zeros = torch.zeros(d_sae, dtype=torch.int64, device=self.features.device)
        return zeros.scatter_add_(0, self.features, (self.values > 0).long())


def starts(counts: Tensor) -> Tensor:
    """Where each of N bags begins, given their sizes [N]."""
    return counts.cumsum(0) - counts


def initial_weights(tokens: Tensor, d_sae: int, generator: torch.Generator) -> SaeWeights:
    """Start from the data: decoder rows point to random tokens, with some noise, and the encoder is their transpose.

    Rows that point where tokens are get used from the start, and stay in use: from random rows, half of the features
    die within a few hundred steps (measured on the embedded model), more than AuxK brings back.

    Args:
        tokens: normalised updates [N, d_model].
        d_sae: features.
        generator: of the draws, on the CPU.
    """
    d_model = tokens.shape[1]
    picks = torch.randint(len(tokens), (d_sae,), generator=generator).to(tokens.device)
    noise = functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1).to(tokens.device)
    rows = functional.normalize(DATA_SHARE * functional.normalize(tokens[picks], dim=1) + noise, dim=1)
    return SaeWeights(rows.T.contiguous(), rows.new_zeros(d_sae), rows, rows.new_zeros(d_model))


def pre_activations(weights: SaeWeights, x: Tensor) -> Tensor:
    """W_enc (x - b_dec) + b_enc: [N, d_model] -> [N, d_sae].

    Both biases are folded into one, which spares a product of the batch with W_enc in the backward pass.
    """
    return torch.addmm(weights.b_enc - weights.b_dec @ weights.W_enc, x, weights.W_enc)


def top_k(pre: Tensor, k: int) -> Active:
    """The k largest pre-activations of each position, and then their positive part: [N, d_sae] -> N k entries."""
    values, features = pre.topk(k, dim=1, sorted=False)
    offsets = torch.arange(len(pre), device=pre.device) * k
    return Active(values.relu().flatten(), features.flatten(), offsets)


def decode(active: Active, rows: Tensor) -> Tensor:
    """Sum of decoder rows by activation, without a bias: -> [N, d_model]."""
    return functional.embedding_bag(active.features, rows, active.offsets, per_sample_weights=active.values, mode="sum")


def reconstruction_loss(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error per dimension; on normalised updates, the fraction of variance unexplained."""
    return (reconstruction - x).square().mean()


def auxk_target(weights: SaeWeights, x: Tensor, pre: Tensor, strongest: int) -> Tensor:
    """What the strongest features of each position leave over of x, for the dead to learn: [N, d_model], detached.

    With all k of them (Gao et al., arXiv 2406.04093, appendix A.2) it is the SAE's own residual. Where an SAE
    explains nearly everything that is a mistake: dead features grow to the size of the residual, which is smaller
    than the k-th activation, and so they never win a place. Measured in short runs
    (docs/training.md): the residual is 1.3, the k-th activation 0.6, the dead reach 0.2, and 46 % of features end dead.
    With half of the k it is 6 %: they learn to be worth the places of the weaker half.
    """
    with torch.no_grad():
        return x - decode(top_k(pre, strongest), weights.W_dec) - weights.b_dec


def auxk_loss(dead_pre: Tensor, target: Tensor, dead_rows: Tensor, k_aux: int) -> Tensor:
    """AuxK: the dead features alone reconstruct a target.

    Args:
        dead_pre: pre-activations of the dead features [N, D]; -inf where one takes no part.
        target: what they are to learn [N, d_model], without b_dec and without a gradient.
        dead_rows: their decoder rows [D, d_model].
        k_aux: dead features that take part at a position, at most.

    Returns:
        Squared error over the target's own square: 1 where the dead do nothing, less as they learn.
    """
    chosen = top_k(dead_pre, min(k_aux, dead_pre.shape[1]))
    error = decode(chosen, dead_rows) - target
    return error.square().mean() / target.square().mean().clamp(min=1e-12)
