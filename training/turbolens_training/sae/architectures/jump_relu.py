"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a learnt threshold for each feature."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Generator, Tensor

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae.architectures.base import LOOK, Export, SaeArchitecture
from turbolens_training.sae.maths import (
    Active,
    best_scale,
    initial_weights,
    pre_activations,
    reconstruction_loss,
    starts,
)


class _JumpReLU(torch.autograd.Function):
    """pre H(pre - threshold), elementwise; dz/dpre = H, and dz/dθ = -θ/ε K((pre - θ)/ε) by equation 11 of the paper.

    K is the rectangular kernel, 1 where its argument is within half of 0, and ε its width.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        gate = pre > threshold
        ctx.save_for_backward(gate, threshold, (pre - threshold).abs() < bandwidth / 2)
        ctx.bandwidth = bandwidth
        return pre * gate

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, threshold, near = ctx.saved_tensors
        return gradients[0] * gate, -gradients[0] * threshold * near / ctx.bandwidth, None


class _Step(torch.autograd.Function):
    """H(pre - threshold), elementwise; dH/dθ = -1/ε K((pre - θ)/ε) by equation 12, and nothing reaches pre."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward((pre - threshold).abs() < bandwidth / 2)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (near,) = ctx.saved_tensors
        return None, -gradients[0] * near / ctx.bandwidth, None


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Active:
    """JumpReLU of pre-activations [N, d_sae] with thresholds [d_sae].

    Besides what is above its threshold, the entries hold what is less than half a bandwidth below, with value 0: the
    gradient there moves the threshold.
    """
    positions, features = (pre.detach() > threshold.detach() - bandwidth / 2).nonzero(as_tuple=True)
    values: Tensor = _JumpReLU.apply(  # type: ignore[no-untyped-call]
        pre[positions, features], threshold[features], bandwidth
    )
    return Active(values, features, starts(positions.bincount(minlength=len(pre))))


@dataclasses.dataclass(frozen=True)
class JumpReLU(SaeArchitecture):
    """Every activation above its feature's own threshold; a penalty holds L0 near a target."""

    k: int
    """The L0 to hold."""
    bandwidth: float
    coefficient: float
    """Weight of the penalty (L0 / k - 1)^2."""

    def initial_weights(self, tokens: Tensor, d_sae: int, generator: Generator) -> SaeWeights:
        """As for the others, with the threshold at which k features are active on average, and in proportion.

        A TopK learns to make its reconstructions smaller where they start too large; here activations would shrink past
        their thresholds, to where no gradient moves these, and nothing would become active again (measured on the
        embedded model: 0.7 features instead of 10, 90 % dead).
        """
        weights = initial_weights(tokens, d_sae, generator)
        x = tokens[:LOOK]
        pre = pre_activations(weights, x)
        threshold = torch.full_like(weights.b_enc, pre.flatten().topk(len(pre) * self.k).values[-1].item())
        made = self.decode(weights, jump_relu(pre, threshold, self.bandwidth))
        scale = best_scale(x, made)
        return dataclasses.replace(weights, W_enc=weights.W_enc * scale, threshold=threshold * scale)

    def encode(self, weights: SaeWeights, pre: Tensor) -> Active:
        return jump_relu(pre, _threshold(weights), self.bandwidth)

    def loss(self, weights: SaeWeights, x: Tensor, pre: Tensor, active: Active, reconstruction: Tensor) -> Tensor:
        gates: Tensor = _Step.apply(pre, _threshold(weights), self.bandwidth)  # type: ignore[no-untyped-call]
        l0 = gates.sum() / len(x)
        return reconstruction_loss(x, reconstruction) + self.coefficient * (l0 / self.k - 1).square()

    def export(self, weights: SaeWeights) -> Export:
        return Export("jumprelu", None, dataclasses.replace(weights, threshold=_threshold(weights)))


def _threshold(weights: SaeWeights) -> Tensor:
    if weights.threshold is None:
        raise ValueError("a JumpReLU SAE has thresholds")
    return weights.threshold.relu()
