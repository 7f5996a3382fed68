"""Encode and decode with one SAE, per position, always: what a row gets never depends on its batch mates.

The slow, readable twin of everything here is :mod:`turbolens_server.sae.reference`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from turbolens_server.sae.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class Codes:
    """Sparse activations: the positive ones in falling order, padded with zeros to the widest position."""

    values: Tensor  # [..., K] float32, >= 0
    indices: Tensor  # [..., K] int64; meaningless where the value is 0

    def of(self, features: Tensor) -> Tensor:
        """Dense activations of some features, [..., F]: 0 where one is not active."""
        hit = self.indices[..., None, :] == features[:, None]  # [..., F, K]
        return (self.values[..., None, :] * hit).sum(-1)


class Sae:
    """An SAE's weights on a device, ready to run in float32."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        weights = bundle.weights
        self.bundle = bundle
        self.W_enc = weights.W_enc.to(device)  # [d_in, d_sae]
        self.W_dec = weights.W_dec.to(device)  # [d_sae, d_in]
        # W_enc (x - b_dec) + b_enc, with both biases folded into one; in float64, since selection is sensitive to it.
        folded = weights.b_enc.double() - weights.b_dec.double() @ weights.W_enc.double()
        self.bias = folded.float().to(device)  # [d_sae]
        self.threshold = None if weights.threshold is None else weights.threshold.to(device)

    def encode(self, x: Tensor) -> Codes:
        """Activations of updates x [..., d_in] (any float type).

        TopK keeps the k largest pre-activations and then their positive part (Gao et al. 2024, arXiv 2406.04093);
        JumpReLU keeps what lies above each feature's threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).
        """
        pre = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]).float(), self.W_enc)  # [N, d_sae]
        if self.threshold is None:
            width = self.bundle.k or pre.shape[-1]
        else:
            pre = pre * (pre > self.threshold)
            width = max(1, int((pre > 0).sum(-1).max()))
        values, indices = pre.topk(width, dim=-1)
        shape = (*x.shape[:-1], width)
        return Codes(values.relu().reshape(shape), indices.reshape(shape))
