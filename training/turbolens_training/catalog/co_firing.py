"""Which features fire together: positions counted over batches in any number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from turbolens_server.catalog.co_firing import KEPT, CoFiring
from turbolens_server.sae.sae import Codes

MOST: Final = 16384
"""Features of an SAE: the counts of all pairs of so many take 1 GiB. Those of larger ones are not counted."""
_ROWS: Final = 4096
"""Positions counted at once: dense, as a product of matrices, which is exact in float32 for so few."""


class CoFiringCounts:
    """Of one SAE: at how many positions each feature is active, and each pair of them."""

    def __init__(self, d_sae: int) -> None:
        self._pairs = torch.zeros(d_sae, d_sae, dtype=torch.int32)
        """On its diagonal, of each feature."""

    @torch.inference_mode()
    def add(self, codes: Sequence[Codes]) -> None:
        """Take in codes [N, P, K], of any number of steps: each position of each counts once."""
        d_sae = len(self._pairs)
        for found in codes:
            values, indices = (tensor.flatten(0, -2) for tensor in found)  # [N * P, K]
            for start in range(0, len(values), _ROWS):
                some = slice(start, start + _ROWS)
                active = values.new_zeros(len(values[some]), d_sae)
                # Where a value is 0 its index means nothing, and must not clear what another one set.
                active.scatter_reduce_(1, indices[some], (values[some] > 0).to(active.dtype), "amax")
                self._pairs += (active.T @ active).to("cpu", torch.int32)

    def most(self) -> CoFiring:
        """Of each feature those with the largest Jaccard index, both / (one + other - both); of equals the first."""
        pairs = self._pairs.double()
        own = pairs.diagonal()
        jaccard = pairs / (own[:, None] + own - pairs).clamp(min=1)
        jaccard.fill_diagonal_(0)
        best, others = jaccard.sort(dim=1, descending=True, stable=True)
        few = slice(min(KEPT, len(own) - 1))
        return CoFiring(
            np.ascontiguousarray(others[:, few].numpy(), np.int32),
            np.ascontiguousarray(best[:, few].numpy(), np.float32),
        )
