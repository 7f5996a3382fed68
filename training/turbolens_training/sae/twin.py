"""Slow, readable twins of the training maths, for tests: dense, one position at a time, no autograd tricks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae.maths import Active


def dense(active: Active, d_sae: int) -> Tensor:
    """Ragged activations written out, [N, d_sae]."""
    z = torch.zeros(len(active.offsets), d_sae, dtype=active.values.dtype)
    ends = [*active.offsets.tolist()[1:], len(active.values)]
    for position, (start, end) in enumerate(zip(active.offsets.tolist(), ends, strict=True)):
        for entry in range(start, end):
            z[position, active.features[entry]] += active.values[entry].detach()
    return z


def pre_activations(weights: SaeWeights, x: Tensor) -> Tensor:
    """W_enc (x - b_dec) + b_enc: [N, d_model] -> [N, d_sae]."""
    return (x - weights.b_dec) @ weights.W_enc + weights.b_enc


def top_k(pre: Tensor, k: int) -> Tensor:
    """Each position keeps its k largest pre-activations, if positive: [N, d_sae] -> [N, d_sae]."""
    z = torch.zeros_like(pre)
    for position, row in enumerate(pre):
        for feature in row.argsort(descending=True)[:k]:
            z[position, feature] = max(float(row[feature]), 0.0)
    return z


def batch_top_k(pre: Tensor, k: int) -> Tensor:
    """The batch of N keeps its N k largest positive pre-activations, wherever they are: [N, d_sae] -> [N, d_sae]."""
    z = torch.zeros_like(pre)
    for flat in pre.flatten().argsort(descending=True)[: len(pre) * k].tolist():
        position, feature = divmod(flat, pre.shape[1])
        z[position, feature] = max(float(pre[position, feature]), 0.0)
    return z


def jump_relu(pre: Tensor, threshold: Tensor) -> Tensor:
    """What is above its feature's threshold [d_sae]: [N, d_sae] -> [N, d_sae]."""
    return torch.where(pre > threshold, pre, 0.0)


def threshold_gradient(pre: Tensor, threshold: Tensor, of_values: Tensor, of_gates: Tensor, bandwidth: float) -> Tensor:
    """The straight-through gradient of a loss for JumpReLU's thresholds, [d_sae].

    Args:
        pre: [N, d_sae].
        threshold: [d_sae], not negative.
        of_values: gradient of the loss for each activation, [N, d_sae].
        of_gates: gradient of the loss for each gate H(pre - threshold), [N, d_sae].
        bandwidth: width of the rectangular kernel.
    """
    gradient = torch.zeros_like(threshold)
    for position in range(len(pre)):
        for feature in range(len(threshold)):
            if abs(pre[position, feature] - threshold[feature]) < bandwidth / 2:
                gradient[feature] -= threshold[feature] / bandwidth * of_values[position, feature]
                gradient[feature] -= 1 / bandwidth * of_gates[position, feature]
    return gradient


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    """Squared error over the variance, of x whose mean is 0 and whose variance is 1 per dimension."""
    return float(((x - reconstruction) ** 2).sum() / x.numel())


def auxk_target(weights: SaeWeights, x: Tensor, strongest: int) -> Tensor:
    """x without what its `strongest` strongest features reconstruct, [N, d_model]."""
    return x - top_k(pre_activations(weights, x), strongest) @ weights.W_dec - weights.b_dec


def auxk_loss(dead_pre: Tensor, target: Tensor, dead_rows: Tensor, k_aux: int) -> float:
    """What share of the target's square the k_aux strongest dead features of each position leave over."""
    left = target - top_k(dead_pre, k_aux) @ dead_rows
    return float((left**2).sum() / (target**2).sum())


def matryoshka_loss(
    weights: SaeWeights, x: Tensor, k: int, ks: Sequence[int], prefixes: Sequence[int], reverse: bool = False
) -> float:
    """Mean FVU of the whole dictionary at k and at each of `ks`, and of every prefix as an SAE of its own at k.

    `reverse`: the smallest of n k counts n times, the next n - 1 times, ...; so do prefixes, the whole being the last.
    """
    pre = pre_activations(weights, x)
    total = count = 0.0
    for place, each in enumerate(sorted((k, *ks))):
        weight = 1 + len(ks) - place if reverse else 1
        total += weight * fvu(x, top_k(pre, each) @ weights.W_dec + weights.b_dec)
        count += weight
    for place, width in enumerate(sorted(prefixes)):
        weight = 1 + len(prefixes) - place if reverse else 1
        total += weight * fvu(x, top_k(pre[:, :width], k) @ weights.W_dec[:width] + weights.b_dec)
        count += weight
    return total / count


def temporal_loss(weights: SaeWeights, updates: Tensor, k: int) -> float:
    """FVU of the changes of normalised updates [T, N, d_model], in units of each step's scale."""
    assert weights.scales is not None
    changes = [updates[0] / weights.scales[0]]
    for step in range(1, len(updates)):
        expected = updates[step - 1]
        if weights.predictors is not None:
            expected = expected @ weights.predictors[step - 1]
        changes.append((updates[step] - expected) / weights.scales[step])
    y = torch.cat(changes, 1)
    return fvu(y, top_k(pre_activations(weights, y), k) @ weights.W_dec + weights.b_dec)
