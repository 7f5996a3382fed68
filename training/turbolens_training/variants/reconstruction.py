"""How well SAEs that are compared reconstruct the same pictures, with intervals over pictures."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Fit:
    """Sums by picture, [N] float64 each."""

    error: Tensor
    spread: Tensor
    """About the mean of all pictures' updates."""
    cosine: Tensor
    """Mean over positions, of an update with its reconstruction."""

    @classmethod
    def of(cls, x: Tensor, made: Tensor) -> Fit:
        """Of updates x and what became of them, both [N, P, d]."""
        exact, found = x.double(), made.double()
        mean = exact.mean((0, 1))
        return cls(
            (exact - found).square().sum((1, 2)),
            (exact - mean).square().sum((1, 2)),
            functional.cosine_similarity(exact, found, dim=-1).mean(1),
        )

    @property
    def explained(self) -> float:
        """Explained variance, 1 - SSE / SST over all."""
        return float(1 - self.error.sum() / self.spread.sum())

    def interval(self) -> tuple[float, float]:
        """Of the explained variance, at 95 %, by drawing the pictures again."""
        picks = self._picks()
        return _middle(1 - self.error[picks].sum(1) / self.spread[picks].sum(1))

    def _picks(self) -> Tensor:
        return torch.randint(len(self.error), (_DRAWS, len(self.error)), generator=torch.Generator().manual_seed(0))

    def row(self) -> dict[str, object]:
        return {
            "pictures": len(self.error),
            "explained": round(self.explained, 4),
            "explained_95": [round(end, 4) for end in self.interval()],
            "cosine": round(float(self.cosine.mean()), 4),
            "cosine_95": [round(end, 4) for end in _middle(self.cosine[self._picks()].mean(1))],
        }


def _middle(drawn: Tensor) -> tuple[float, float]:
    low, high = drawn.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
