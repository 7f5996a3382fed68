"""The kernels in plain torch: the operators on a CPU, and on a GPU the baseline (cuBLAS, `torch.topk`, a gather).

What serves on a CPU is decode and edits; `turbolens_server.sae.sae` encodes there by itself, which is faster than a
call through an operator. The fused kernels serve on a GPU, see :mod:`turbolens_server.kernels.choice`.

Every function has the arguments and results of its namesake in :mod:`turbolens_server.kernels.fused`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional


def pre_activations(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
    """x W_enc + bias in float32 (float64 for float64): [N, d_model] -> [N, d_sae]."""
    if x.is_cuda and x.dtype == W_enc.dtype and x.dtype in (torch.float16, torch.bfloat16):
        # Tensor cores take the halves as they are and accumulate in float32.
        return torch.mm(x, W_enc, out_dtype=torch.float32) + bias.float()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.addmm(bias.to(dtype), x.to(dtype), W_enc.to(dtype))


def encode_topk(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices [N, k] of the k largest pre-activations, and which rows were flagged: none, [N] zeros.

    Among equal values, the smaller index first: on a CPU. On a GPU `torch.topk` chooses, since to look for ties there
    would make the host wait.
    """
    pre = pre_activations(x, W_enc, bias)
    # One more than is wanted shows whether the last one is tied with the first that is left out.
    values, indices = pre.topk(min(k + 1, pre.shape[1]), dim=1)
    if not pre.is_cuda:
        equal = values[:, :-1] == values[:, 1:]
        if equal.any():
            tied = (equal & (values[:, 1:] > 0)).any(1)
            best, order = pre[tied].sort(dim=1, descending=True, stable=True)
            values[tied], indices[tied] = best[:, : values.shape[1]], order[:, : values.shape[1]]
    flagged = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    return values[:, :k].relu(), indices[:, :k].contiguous(), flagged


def encode_jumprelu(
    x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, max_l0: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest max_l0 activations above threshold, falling: values, indices [N, max_l0]; active features [N]."""
    pre = pre_activations(x, W_enc, bias)
    active = ((pre > threshold) & (pre > 0)) | pre.isnan()
    values, indices = torch.where(active, pre, 0).topk(max_l0, dim=1)
    return values, indices, active.sum(1, dtype=torch.int32)


def gather_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of decoder rows by activation, without b_dec: [N, K] -> [N, d_model]."""
    if not values.numel():
        return values.new_zeros(len(values), W_dec.shape[1])
    return functional.embedding_bag(indices, W_dec.to(values.dtype), per_sample_weights=values, mode="sum")


def apply_edits(
    x: Tensor,
    gain: Tensor,
    offsets: Tensor,
    features: Tensor,
    slope: Tensor,
    shift: Tensor,
    W_dec: Tensor,
    values: Tensor,
    indices: Tensor,
) -> Tensor:
    """gain x + sum over a row's edited features of (slope z + shift) d_j: [B, P, d_model], in x's type.

    Row by row, since on a CPU a product over the features of all rows, mostly zeros, is many times as much work.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = gain[..., None] * x.to(dtype)
    for row, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        if start == stop:
            continue
        own, amounts = features[start:stop], shift[start:stop]  # [S], [S, P]
        if values.shape[-1]:
            # Looked up from what is active, which is far less than what may be edited.
            entry = own.new_full((len(W_dec),), -1).scatter(0, own, torch.arange(len(own), device=own.device))
            entry = entry[indices[row]]  # [P, K]
            position, slot = (entry >= 0).nonzero(as_tuple=True)
            at = (entry[position, slot], position)
            moved = slope[start:stop][at] * values[row][position, slot]
            amounts = amounts.index_put(at, moved.to(amounts.dtype), accumulate=True)
        out[row] += amounts.T.to(dtype) @ W_dec[own].to(dtype)
    return out.to(x.dtype)
