"""Slow, readable twins of the kernels, for tests: one row, one feature, one position at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pre_activations(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
    """x W_enc + bias in float64: [N, d_model] -> [N, d_sae]."""
    return x.double() @ W_enc.double() + bias.double()


def select_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [N, k] of the largest pre-activations [N, d_sae]: NaN first, larger value, smaller feature.

    What is not positive counts as 0.
    """
    values, indices = [], []
    for row in pre.relu().tolist():
        order = sorted(range(len(row)), key=lambda j: (not math.isnan(row[j]), -row[j], j))[:k]
        values.append([row[j] for j in order])
        indices.append(order)
    return torch.tensor(values, dtype=pre.dtype).view(len(pre), k), torch.tensor(indices).view(len(pre), k)


def select_above(pre: Tensor, threshold: Tensor) -> list[list[tuple[float, int]]]:
    """By row, the (value, feature) of what is positive and strictly above its threshold; larger first."""
    rows = []
    for row in pre.tolist():
        active = [(v, j) for j, v in enumerate(row) if v > max(0.0, float(threshold[j])) or math.isnan(v)]
        rows.append(sorted(active, key=lambda pair: (not math.isnan(pair[0]), -pair[0], pair[1])))
    return rows


def gather_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of decoder rows by activation: [N, K] -> [N, d_model], in float64."""
    out = torch.zeros(len(values), W_dec.shape[1], dtype=torch.float64)
    for n in range(len(values)):
        for value, index in zip(values[n].tolist(), indices[n].tolist(), strict=True):
            out[n] += value * W_dec[index].double()
    return out


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
    """gain x + sum over a row's entries of (slope z + shift) d_j: [B, P, d_model], in float64."""
    out = gain[..., None].double() * x.double()
    for b in range(len(x)):
        for entry in range(int(offsets[b]), int(offsets[b + 1])):
            feature = int(features[entry])
            for p in range(x.shape[1]):
                z = sum(v for v, j in zip(values[b, p].tolist(), indices[b, p].tolist(), strict=True) if j == feature)
                out[b, p] += (float(slope[entry, p]) * z + float(shift[entry, p])) * W_dec[feature].double()
    return out
