"""Temporal: features of what each denoising step does beyond what the one before tells, over runs of a fixed length."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Generator, Tensor

from turbolens_server.sae.bundle import SaeWeights
from turbolens_server.sae.temporal import changes
from turbolens_training.sae.architectures.base import Export, Pass, SaeArchitecture
from turbolens_training.sae.architectures.batch_topk import BatchTopK
from turbolens_training.sae.architectures.topk import TopK
from turbolens_training.sae.config import Prediction
from turbolens_training.sae.maths import Active

RIDGE: Final = 1e-3
"""Of the ridge regressions, as a share of the mean variance of what they predict from."""


@dataclasses.dataclass(frozen=True)
class Temporal(SaeArchitecture):
    """Features of the changes of a whole run at every position, selected as by another architecture.

    `turbolens_server.sae.temporal` has the algebra. The changes of every step get unit variance, once and for all from
    the first tokens: on the embedded model the later ones have less than a hundredth of the first update's variance,
    and without a unit of their own no feature would learn them.
    """

    selection: TopK | BatchTopK
    steps: int
    """T, of a run; tokens are the updates of its steps side by side, [N, T * d_model]."""
    prediction: Prediction = "last"

    def initial_weights(self, tokens: Tensor, d_sae: int, generator: Generator) -> SaeWeights:
        ones = torch.ones(self.steps, device=tokens.device)
        predictors = self._predictors(tokens)
        left = changes(tokens, ones, predictors)
        squares = left.double().square().mean(0).unflatten(0, (self.steps, -1)).mean(1)
        scales = torch.where(squares > 0, squares.sqrt(), 1.0).float()
        weights = self.selection.initial_weights(changes(tokens, scales, predictors), d_sae, generator)
        return dataclasses.replace(weights, scales=scales.detach(), predictors=predictors)

    def _predictors(self, tokens: Tensor) -> Tensor | None:
        """Each step's predictor from the step before, [T - 1, d_model, d_model]; None: the identity."""
        if self.prediction == "last":
            return None
        at_steps = tokens.unflatten(1, (self.steps, -1)).double()  # centred: a step needs no offset
        pairs = zip(at_steps[:, :-1].unbind(1), at_steps[:, 1:].unbind(1), strict=True)
        found = torch.stack([ridge(before, after) for before, after in pairs]).float()
        return found if self.prediction == "ridge" else torch.zeros_like(found)

    def trainable(self, weights: SaeWeights) -> dict[str, Tensor]:
        learnt = self.selection.trainable(weights)
        return {name: tensor for name, tensor in learnt.items() if name not in ("scales", "predictors")}

    def read(self, weights: SaeWeights, x: Tensor) -> Tensor:
        if weights.scales is None:
            raise ValueError("a temporal SAE has scales")
        return changes(x, weights.scales, weights.predictors)

    def encode(self, weights: SaeWeights, pre: Tensor) -> Active:
        return self.selection.encode(weights, pre)

    def loss(self, weights: SaeWeights, x: Tensor, pre: Tensor, active: Active, reconstruction: Tensor) -> Tensor:
        return self.selection.loss(weights, x, pre, active, reconstruction)

    def run(self, weights: SaeWeights, x: Tensor) -> Pass:
        return self.selection.run(weights, x)

    def observe(self, weights: SaeWeights, done: Pass) -> None:
        self.selection.observe(weights, done)

    def export(self, weights: SaeWeights) -> Export:
        return dataclasses.replace(self.selection.export(weights), architecture="turbolens-temporal")


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The matrix P [d, e] of least |y - x P|² + n λ |P|², for x [n, d] and y [n, e], both centred, float64."""
    gram = x.T @ x
    shrinkage = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    found: Tensor = torch.linalg.solve(gram + shrinkage, x.T @ y)
    return found
