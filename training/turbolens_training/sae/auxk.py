"""Dead features, and AuxK, by which they learn (Gao et al., arXiv 2406.04093, appendix A.2).

The slow, readable twin is :mod:`turbolens_training.sae.twin`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae.maths import Active, decode, pre_activations, rectangular, select, top_k

DENSE_DEAD: Final = 64
"""Dead features, at most, that are computed densely."""


def dead_features(idle: Tensor, tokens: int, held_out: Tensor | None = None) -> Tensor:
    """Which features are dead, [d_sae] bool: nothing that they were shown for a while lifts them.

    The one definition, told in docs/training.md. Training asks it of its own tokens; what is exported is asked once
    more, on held-out data. Where only those are known, as in `turbolens train evaluate`, features are `never_active`.

    Args:
        idle: tokens of training since each feature was last active, [d_sae].
        tokens: how many in a row make it dead: `dead_tokens`, or all there were, if those were fewer.
        held_out: held-out positions at which each is active, [d_sae]; None: none were looked at.
    """
    dead = idle >= tokens
    return dead if held_out is None else dead & (held_out == 0)


def strongest(pre: Tensor, active: Active, k: int) -> Active:
    """As :func:`top_k`, from what is active already where that is enough."""
    if active.width is None or active.width < k:
        return top_k(pre, k)
    values, features = (entries.view(-1, active.width) for entries in (active.values, active.features))
    picks = values.topk(k, dim=1, sorted=False).indices
    return rectangular(values.gather(1, picks), features.gather(1, picks))


def top_k_among(pre: Tensor, k: int, members: Tensor, barred: Tensor) -> Active:
    """As :func:`top_k`, of the features `members` [D] int64 alone, without those that are `barred` [D] bool."""
    found = pre.detach()[:, members].masked_fill_(barred, -torch.inf).topk(min(k, len(members)), dim=1, sorted=False)
    features = members[found.indices]
    return rectangular(select(pre, features).relu().masked_fill(found.values.isneginf(), 0), features)


def auxk_target(weights: SaeWeights, x: Tensor, active: Active) -> Tensor:
    """What the strongest features of each position leave over of x, for the dead to learn: [N, d_model], detached.

    With all k of them (Gao et al., arXiv 2406.04093, appendix A.2) it is the SAE's own residual. Where an SAE
    explains nearly everything that is a mistake: dead features grow to the size of the residual, which is smaller
    than the k-th activation, and so they never win a place. Measured in short runs
    (docs/training.md): the residual is 1.3, the k-th activation 0.6, the dead reach 0.2, and 46 % of features end dead.
    With half of the k it is 6 %: they learn to be worth the places of the weaker half.
    """
    with torch.no_grad():
        return x - decode(active, weights.W_dec) - weights.b_dec


def decode_dead(weights: SaeWeights, x: Tensor, pre: Tensor, k: int, members: Tensor, barred: Tensor) -> Tensor:
    """What the k strongest of the dead features reconstruct at each position, without a bias: -> [N, d_model].

    A few are computed densely, each from its own column: that spares sorting, and where there are no more than k,
    selecting too.

    Args:
        weights: of the SAE.
        x: data [N, d_model].
        pre: what :func:`pre_activations` gives for it, [N, d_sae]; read where there are many dead features.
        k: features that take part at a position, at most.
        members: the dead features, [D] int64.
        barred: which of them do not take part, [D] bool.
    """
    if len(members) > DENSE_DEAD:
        pre = pre_activations(weights, x, pre)
        return decode(top_k_among(pre, k, members, barred), weights.W_dec)
    columns = weights.W_enc.index_select(1, members)
    bias = weights.b_enc.index_select(0, members) - weights.b_dec @ columns
    z = torch.addmm(bias, x, columns).relu().masked_fill(barred, 0)
    if len(members) > k:
        z = z * torch.zeros_like(z).scatter_(1, z.detach().topk(k, dim=1, sorted=False).indices, 1)
    return z @ weights.W_dec.index_select(0, members)


def auxk_loss(made: Tensor, target: Tensor) -> Tensor:
    """AuxK: the dead features alone reconstruct a target.

    Args:
        made: what dead features reconstruct, of as many as take part at a position, [N, d_model].
        target: what they are to learn [N, d_model], without b_dec and without a gradient.

    Returns:
        Squared error over the target's own square: 1 where the dead do nothing, less as they learn.
    """
    return functional.mse_loss(made, target) / target.square().mean().clamp(min=1e-12)
