"""Adam that keeps the decoder's rows at unit norm, as part of its step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class UnitRowAdam(torch.optim.Adam):
    """Adam under the constraint that the rows of one matrix have norm 1.

    Each step takes the part of the gradient along a row away (it would only change the norm), steps, and normalises.
    After the step, not before: every checkpoint is exactly unit, so activations mean the same for every feature.
    """

    def __init__(self, parameters: Iterable[Tensor], unit_rows: Tensor, lr: float) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
        self._unit_rows = unit_rows  # [rows, width], one of the parameters

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One constrained step; closures are not supported."""
        rows = self._unit_rows
        if rows.grad is not None:
            rows.grad.addcmul_((rows.grad * rows).sum(1, keepdim=True), rows, value=-1)
        super().step(closure)
        rows /= rows.norm(dim=1, keepdim=True)
