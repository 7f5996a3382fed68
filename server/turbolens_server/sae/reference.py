"""Slow, readable twins of the SAE and steering maths, for tests: dense, and one position at a time where clearer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbolens_server.sae.bundle import Bundle
from turbolens_server.sae.steering import ResolvedEdit


def encode_dense(bundle: Bundle, x: Tensor, k: int | None = None, prefix: int | None = None) -> Tensor:
    """Dense activations [N, d_sae] of updates x [N, d_in]: ReLU(TopK(W_enc (x - b_dec) + b_enc)), or JumpReLU.

    Of a Matryoshka at another k than its own, and at a prefix: 0 past it.
    """
    w = bundle.weights
    pre = (x.float() - w.b_dec) @ w.W_enc + w.b_enc
    if w.threshold is not None:
        return torch.where(pre > w.threshold, pre, 0).relu()
    k = k or bundle.k
    if k is None:
        raise ValueError("a TopK bundle has a k")
    values, indices = pre[:, :prefix].topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values).relu()


def decode_dense(bundle: Bundle, z: Tensor) -> Tensor:
    """Reconstruction [N, d_in] of dense activations z [N, d_sae]."""
    return z @ bundle.weights.W_dec + bundle.weights.b_dec


def steer_dense(
    bundle: Bundle, x: Tensor, edits: Sequence[ResolvedEdit], k: int | None = None, prefix: int | None = None
) -> Tensor:
    """Steer updates x [P, d_in] of one picture by edits, with every activation written out.

    The result is x + sum_j (z'_j - z_j) d_j; a `replace` swaps that share of the whole update instead, and leaves
    the swapped-in activations for the edits after it.
    """
    z = encode_dense(bundle, x, k, prefix)  # [P, d_sae]
    W_dec = bundle.weights.W_dec
    out = x.float().clone()
    ordered = [e for e in edits if e.kind == "replace"] + [e for e in edits if e.kind != "replace"]
    for position in range(len(x)):
        for edit in ordered:
            m = float(edit.mask[position])
            features, amounts = edit.features.tolist(), edit.amounts.tolist()
            if edit.kind == "replace":
                out[position] = (1 - m) * out[position]
                z[position] = (1 - m) * z[position]
            for j, amount in zip(features, amounts, strict=True):
                old = float(z[position, j])
                new = {
                    "add": old + amount * m,
                    "scale": old + m * (amount - 1) * old,
                    "set": (1 - m) * old + m * amount,
                    "replace": old + m * amount,
                }[edit.kind]
                z[position, j] = new
                out[position] += (new - old) * W_dec[j]
    return out
