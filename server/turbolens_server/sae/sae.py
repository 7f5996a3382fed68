"""Encode and decode with one SAE, per position, always: what a row gets never depends on its batch mates.

The slow, readable twin of everything here is :mod:`turbolens_server.sae.twin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from turbolens_server.kernels import ops
from turbolens_server.kernels.select import Pick, select_topk
from turbolens_server.sae.bundle import Bundle
from turbolens_server.sae.temporal import changes, directions

_SLOTS: Final = 64
"""Features of a position that a JumpReLU encode on a GPU first has room for."""


class Codes(NamedTuple):
    """Sparse activations: the positive ones in falling order, padded with zeros to the widest position."""

    values: Tensor  # [..., K] float32, >= 0
    indices: Tensor  # [..., K] int64; meaningless where the value is 0

    def of(self, features: Tensor) -> Tensor:
        """Dense activations of some features, [..., F]: 0 where one is not active."""
        hit = self.indices[..., None, :] == features[:, None]  # [..., F, K]
        return (self.values[..., None, :] * hit).sum(-1)


def in_one(parts: Sequence[tuple[Sequence[int], Codes]]) -> Codes:
    """Codes of rows that were encoded apart as one, padded to the widest: each part with the places of its rows."""
    rows, first = sum(len(places) for places, _ in parts), parts[0][1].values
    width = max(codes.values.shape[-1] for _, codes in parts)
    values = first.new_zeros(rows, *first.shape[1:-1], width)
    indices = torch.zeros_like(values, dtype=torch.int64)
    for places, codes in parts:
        own = (list(places), ..., slice(codes.values.shape[-1]))
        values[own], indices[own] = codes.values, codes.indices
    return Codes(values, indices)


class Sae:
    """An SAE's weights on a device, ready to run.

    On a CPU in float32. On a GPU the kernels multiply updates with encoder weights in `operands` and add, select and
    decode in float32.
    """

    def __init__(self, bundle: Bundle, device: torch.device, operands: torch.dtype = torch.float32) -> None:
        weights = bundle.weights
        self.bundle = bundle
        # What a temporal SAE writes are updates too, though its weights are of their changes.
        temporal = weights.scales is not None
        W_dec, b_dec = directions(weights) if temporal else (weights.W_dec, weights.b_dec)
        self._fused = device.type == "cuda"
        self.W_enc = weights.W_enc.to(device, operands if self._fused else torch.float32)  # [d_in, d_sae]
        self.W_dec = W_dec.to(device)  # [d_sae, d_in]
        self.b_dec = b_dec.to(device)  # [d_in]
        # W_enc (x - b_dec) + b_enc, with both biases folded into one; in float64, since selection is sensitive to it.
        folded = weights.b_enc.double() - weights.b_dec.double() @ weights.W_enc.double()
        self.bias = folded.float().to(device)  # [d_sae]
        self.threshold = None if weights.threshold is None else weights.threshold.to(device)
        self._scales = None if weights.scales is None else weights.scales.to(device)
        self._predictors = None if weights.predictors is None else weights.predictors.to(device)

    def encode(self, x: Tensor, *, k: int | None = None, prefix: int | None = None, pick: Pick | None = None) -> Codes:
        """Activations of updates x [..., d_in] (any float type); of a temporal SAE, those of all steps side by side.

        TopK keeps the k largest pre-activations and then their positive part (Gao et al. 2024, arXiv 2406.04093);
        JumpReLU keeps what lies above each feature's threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

        Args:
            x: updates.
            k: of a Matryoshka TopK, 1 to `nesting.k_max`; None: the bundle's own.
            prefix: of a Matryoshka, one of `nesting.prefixes`: only so many first features exist. None: all.
            pick: selects on a CPU; None: NumPy.

        Raises:
            ValueError: the bundle does not allow this k or prefix, or reads another width.
        """
        if x.shape[-1] != self.bundle.d_in:
            runs = f", the updates of {self.bundle.steps} steps side by side" if self.bundle.steps else ""
            raise ValueError(f"the SAE {self.bundle.name} reads {self.bundle.d_in} dimensions{runs}, not {x.shape[-1]}")
        if refused := self.bundle.refused(k, prefix):
            asked = {"k": k, "prefix": prefix}
            raise ValueError(
                "; ".join(f"{name}={asked[name]}: the SAE {self.bundle.name} {why}" for name, why in refused.items())
            )
        k, d_sae = k or self.bundle.k, prefix or self.bundle.d_sae
        W_enc, bias = self.W_enc, self.bias
        if d_sae < len(bias):
            W_enc, bias = W_enc[:, :d_sae], bias[:d_sae]
        if self._scales is not None:
            x = changes(x.float(), self._scales, self._predictors)
        if self._fused:
            return self._encode_fused(x, W_enc, bias, k or d_sae)
        pre = torch.addmm(bias, x.reshape(-1, x.shape[-1]).float(), W_enc)  # [N, d_sae]
        if self.threshold is None:
            width = k or d_sae
        else:
            pre = pre * (pre > self.threshold[:d_sae])
            width = max(1, int((pre > 0).sum(-1).max()))
        values, indices = select_topk(pre, width, pick)
        shape = (*x.shape[:-1], width)
        return Codes(values.reshape(shape), indices.reshape(shape))

    def _encode_fused(self, x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Codes:
        flat = x.reshape(-1, x.shape[-1]).to(W_enc.dtype)
        if self.threshold is None:
            values, indices, _ = ops.encode_topk(flat, W_enc, bias, k)
        else:
            threshold, slots = self.threshold[: len(bias)], min(_SLOTS, len(bias))
            values, indices, counts = ops.encode_jumprelu(flat, W_enc, bias, threshold, slots)
            if (most := int(counts.max())) > slots:
                # Rounded up, as a kernel is compiled for each number of slots: a few sizes, not one for each batch.
                room = min(len(bias), 1 << (most - 1).bit_length())
                values, indices, _ = ops.encode_jumprelu(flat, W_enc, bias, threshold, room)
        shape = (*x.shape[:-1], values.shape[-1])
        return Codes(values.reshape(shape), indices.reshape(shape))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct updates from their codes, [..., d_in] float32."""
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (codes.values, codes.indices)]
        rows = ops.gather_decode(flat[0], flat[1], self.W_dec)
        return (rows + self.b_dec).reshape(*codes.values.shape[:-1], -1)

    def directions(self, step: int) -> Tensor:
        """What one of each feature adds to the update of a step, [d_sae, d_model]; of a temporal SAE others at each."""
        if self.bundle.steps is None:
            return self.W_dec
        return self.W_dec[:, step * self.bundle.d_model : (step + 1) * self.bundle.d_model]
