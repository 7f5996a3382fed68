"""Encode and decode with one SAE, per position, always: what a row gets never depends on its batch mates.

The slow, readable twin of everything here is :mod:`turbolens_server.sae.reference`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle
from turbolens_server.sae.temporal import changes, directions


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
        # What a temporal SAE writes are updates too, though its weights are of their changes.
        temporal = weights.scales is not None
        W_dec, b_dec = directions(weights) if temporal else (weights.W_dec, weights.b_dec)
        self.W_enc = weights.W_enc.to(device)  # [d_in, d_sae]
        self.W_dec = W_dec.to(device)  # [d_sae, d_in]
        self.b_dec = b_dec.to(device)  # [d_in]
        # W_enc (x - b_dec) + b_enc, with both biases folded into one; in float64, since selection is sensitive to it.
        folded = weights.b_enc.double() - weights.b_dec.double() @ weights.W_enc.double()
        self.bias = folded.float().to(device)  # [d_sae]
        self.threshold = None if weights.threshold is None else weights.threshold.to(device)
        self._scales = None if weights.scales is None else weights.scales.to(device)

    def encode(self, x: Tensor, *, k: int | None = None, prefix: int | None = None) -> Codes:
        """Activations of updates x [..., d_in] (any float type); of a temporal SAE, those of all steps side by side.

        TopK keeps the k largest pre-activations and then their positive part (Gao et al. 2024, arXiv 2406.04093);
        JumpReLU keeps what lies above each feature's threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

        Args:
            x: updates.
            k: of a Matryoshka, 1 to `nesting.k_max`; None: the bundle's own.
            prefix: of a Matryoshka, one of `nesting.prefixes`: only so many first features exist. None: all.

        Raises:
            ValueError: the bundle does not allow this k or prefix, or reads another width.
        """
        if x.shape[-1] != self.bundle.d_in:
            runs = f", the updates of {self.bundle.steps} steps side by side" if self.bundle.steps else ""
            raise ValueError(f"the SAE {self.bundle.name} reads {self.bundle.d_in} dimensions{runs}, not {x.shape[-1]}")
        k, d_sae = self._size(k, prefix)
        W_enc, bias = self.W_enc[:, :d_sae], self.bias[:d_sae]
        rows = x.reshape(-1, x.shape[-1]).float()
        if self._scales is not None:
            rows = changes(rows, self._scales)
        pre = torch.addmm(bias, rows, W_enc)  # [N, d_sae]
        if self.threshold is None:
            width = k or d_sae
        else:
            pre = pre * (pre > self.threshold)
            width = max(1, int((pre > 0).sum(-1).max()))
        values, indices = pre.topk(width, dim=-1)
        shape = (*x.shape[:-1], width)
        return Codes(values.relu().reshape(shape), indices.reshape(shape))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct updates from their codes, [..., d_in] float32."""
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (codes.indices, codes.values)]
        rows = functional.embedding_bag(flat[0], self.W_dec, per_sample_weights=flat[1], mode="sum")
        return (rows + self.b_dec).reshape(*codes.values.shape[:-1], -1)

    def directions(self, step: int) -> Tensor:
        """What one of each feature adds to the update of a step, [d_sae, d_model]; of a temporal SAE others at each."""
        if self.bundle.steps is None:
            return self.W_dec
        return self.W_dec[:, step * self.bundle.d_model : (step + 1) * self.bundle.d_model]

    def _size(self, k: int | None, prefix: int | None) -> tuple[int | None, int]:
        """The k and the number of features to serve, checked."""
        own_k, d_sae, nesting = self.bundle.k, self.bundle.d_sae, self.bundle.nesting
        if k not in (None, own_k) and not (nesting and 1 <= k <= nesting.k_max):
            allowed = f"1 to {nesting.k_max}" if nesting else f"only {own_k or 'none'}"
            raise ValueError(f"k={k}: the SAE {self.bundle.name} allows {allowed}")
        if prefix not in (None, d_sae) and not (nesting and prefix in nesting.prefixes):
            allowed = ", ".join(map(str, nesting.prefixes)) if nesting else f"only {d_sae}"
            raise ValueError(f"prefix={prefix}: the SAE {self.bundle.name} allows {allowed}")
        return k or own_k, prefix or d_sae
