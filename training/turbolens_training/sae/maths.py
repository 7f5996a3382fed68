"""The maths that SAEs of every architecture share, as pure functions: encode, select, decode, and the losses.

The slow, readable twin of everything here is :mod:`turbolens_training.sae.twin`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import SaeWeights

DATA_SHARE: Final = 4 / 3
"""How much of a first decoder row is a token, to 1 of noise: 0.8 of it, once normalised."""
_ROUND: Final = 4
"""Features that meet in the first of two rounds of a selection on a CPU."""


@dataclasses.dataclass(frozen=True)
class Active:
    """The selected activations of a batch of N positions, ragged: an architecture need not select k at each."""

    values: Tensor  # [M] float32, >= 0
    features: Tensor  # [M] int64, of the first position, then of the second, ...
    offsets: Tensor  # [N] int64, where each position begins
    width: int | None = None
    """Entries of each position, where all have as many."""

    def counts(self, d_sae: int) -> Tensor:
        """Positions at which each feature is active, [d_sae] int64."""
        # Not bincount: that waits for the device, to learn how long its answer is.
        zeros = torch.zeros(d_sae, dtype=torch.int64, device=self.features.device)
        return zeros.scatter_add_(0, self.features, (self.values > 0).long())


def starts(counts: Tensor) -> Tensor:
    """Where each of N bags begins, given their sizes [N]."""
    return counts.cumsum(0) - counts


def initial_weights(tokens: Tensor, d_sae: int, generator: torch.Generator) -> SaeWeights:
    """Start from the data: decoder rows point to random tokens, with some noise, and the encoder is their transpose.

    Rows that point where tokens are get used from the start, and stay in use: from random rows, half of the features
    die within a few hundred steps (measured on the embedded model), more than AuxK brings back.

    Args:
        tokens: normalised updates [N, d_model].
        d_sae: features.
        generator: of the draws, on the CPU.
    """
    d_model = tokens.shape[1]
    picks = torch.randint(len(tokens), (d_sae,), generator=generator).to(tokens.device)
    noise = functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=1).to(tokens.device)
    rows = functional.normalize(DATA_SHARE * functional.normalize(tokens[picks], dim=1) + noise, dim=1)
    return SaeWeights(rows.T.contiguous(), rows.new_zeros(d_sae), rows, rows.new_zeros(d_model))


def best_scale(x: Tensor, reconstruction: Tensor) -> Tensor:
    """The factor of a reconstruction at which it is nearest to x: both [N, d_model] -> scalar."""
    return (x * reconstruction).sum() / reconstruction.square().sum().clamp(min=1e-12)


class _PreActivations(torch.autograd.Function):
    """W_enc (x - b_dec) + b_enc. A gradient that is sparse (see :func:`select`) is never written out, [N, d_sae]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, made: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        if made is not None:
            return made.view_as(made)
        # Both biases are folded into one, which spares a product of the batch with W_enc in the backward pass.
        return torch.addmm(b_enc - b_dec @ W_enc, x, W_enc)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        x, W_enc, b_dec = ctx.saved_tensors
        (gradient,) = gradients
        if gradient.is_sparse:
            positions, features = gradient._indices()
            values = gradient._values()
            of_bias = x.new_zeros(W_enc.shape[1]).scatter_add_(0, features, values)
            of_rows = decode(by_feature(values, positions, features, W_enc.shape[1]), x)
        else:
            of_bias = gradient.sum(0)
            of_rows = gradient.T @ x
        return None, of_rows.addr_(of_bias, b_dec, alpha=-1).T, of_bias, -(W_enc @ of_bias), None


def pre_activations(weights: SaeWeights, x: Tensor, made: Tensor | None = None) -> Tensor:
    """W_enc (x - b_dec) + b_enc: [N, d_model] -> [N, d_sae].

    Args:
        weights: of the SAE.
        x: data; no gradient reaches it.
        made: what this gave already, for a second selection from it: of one tensor, autograd would merge the sparse
            gradients of both entry by entry. On a GPU they are dense, and it is given back as it is.
    """
    if made is not None and made.is_cuda:
        return made
    pre: Tensor = _PreActivations.apply(  # type: ignore[no-untyped-call]
        x, weights.W_enc, weights.b_enc, weights.b_dec, None if made is None else made.detach()
    )
    return pre


def by_feature(values: Tensor, positions: Tensor, features: Tensor, d_sae: int) -> Active:
    """Entries [M] of a matrix [N, d_sae] on the CPU as its transpose, whose bags are features and hold positions."""
    count = len(features)
    # Each key is another, so that the order is one, and a run repeats its bits. NumPy sorts them ten times as fast.
    keys = torch.from_numpy(np.sort((features * count + torch.arange(count)).numpy()))
    order = keys % count
    return Active(values[order], positions[order], torch.searchsorted(keys, torch.arange(d_sae) * count))


def select(pre: Tensor, features: Tensor) -> Tensor:
    """Pre-activations of chosen features at each position: [N, d_sae], [N, m] int64 -> [N, m].

    On a CPU the gradient of what :func:`pre_activations` gave is sparse: as it is zero elsewhere, that spares the
    backward pass a product as large as the forward pass's.
    """
    sparse = pre.device.type == "cpu" and pre.grad_fn is not None and pre.grad_fn.name() == "_PreActivationsBackward"
    return pre.gather(1, features, sparse_grad=sparse)


def _rectangular(values: Tensor, features: Tensor) -> Active:
    """As many entries at each position: both [N, k]."""
    positions, width = values.shape
    offsets = torch.arange(positions, device=values.device) * width
    return Active(values.flatten(), features.flatten(), offsets, width)


def largest(pre: Tensor, k: int) -> Tensor:
    """The features of the k largest pre-activations of each position, in any order: [N, d_sae] -> [N, k].

    In two rounds on a CPU: who is among the k largest is in one of the k groups with the largest maxima.
    """
    groups = pre.shape[1] // _ROUND
    if pre.is_cuda or pre.shape[1] % _ROUND or groups < k:
        return pre.topk(k, dim=1, sorted=False).indices
    best = pre.view(-1, _ROUND, groups).amax(1).topk(k, dim=1, sorted=False).indices
    left = (best[:, None] + groups * torch.arange(_ROUND)[:, None]).flatten(1)
    return left.gather(1, pre.gather(1, left).topk(k, dim=1, sorted=False).indices)


def top_k(pre: Tensor, k: int) -> Active:
    """The k largest pre-activations of each position, and then their positive part: [N, d_sae] -> N k entries."""
    features = largest(pre.detach(), k)
    return _rectangular(select(pre, features).relu(), features)


def strongest(pre: Tensor, active: Active, k: int) -> Active:
    """As :func:`top_k`, from what is active already where that is enough."""
    if active.width is None or active.width < k:
        return top_k(pre, k)
    values, features = (entries.view(-1, active.width) for entries in (active.values, active.features))
    picks = values.topk(k, dim=1, sorted=False).indices
    return _rectangular(values.gather(1, picks), features.gather(1, picks))


def top_k_among(pre: Tensor, k: int, members: Tensor, barred: Tensor) -> Active:
    """As :func:`top_k`, of the features `members` [D] int64 alone, without those that are `barred` [D] bool."""
    found = pre.detach()[:, members].masked_fill_(barred, -torch.inf).topk(min(k, len(members)), dim=1, sorted=False)
    features = members[found.indices]
    return _rectangular(select(pre, features).relu().masked_fill(found.values.isneginf(), 0), features)


def _sum_of_rows(active: Active, rows: Tensor) -> Tensor:
    return functional.embedding_bag(active.features, rows, active.offsets, per_sample_weights=active.values, mode="sum")


class _RowsGradient(torch.autograd.Function):
    """Passes a decoded batch on, and gives the decoder rows it was made of their gradient."""

    @staticmethod
    def forward(ctx: Any, decoded: Tensor, rows: Tensor, values: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, features, offsets)
        ctx.d_sae = len(rows)
        return decoded.view_as(decoded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        values, features, offsets = ctx.saved_tensors
        (gradient,) = gradients
        entries = torch.arange(len(values), device=values.device)
        positions = torch.searchsorted(offsets, entries, right=True) - 1
        return gradient, _sum_of_rows(by_feature(values, positions, features, ctx.d_sae), gradient), None, None, None


def decode(active: Active, rows: Tensor) -> Tensor:
    """Sum of decoder rows by activation, without a bias: -> [N, d_model]."""
    if rows.is_cuda or not rows.requires_grad:
        return _sum_of_rows(active, rows)
    # On a CPU, embedding_bag's own gradient of its rows takes three times as long.
    decoded: Tensor = _RowsGradient.apply(  # type: ignore[no-untyped-call]
        _sum_of_rows(active, rows.detach()), rows, active.values.detach(), active.features, active.offsets
    )
    return decoded


def reconstruction_loss(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error per dimension; on normalised updates, the fraction of variance unexplained."""
    return functional.mse_loss(reconstruction, x)


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


def auxk_loss(learning: Active, target: Tensor, rows: Tensor) -> Tensor:
    """AuxK: the dead features alone reconstruct a target.

    Args:
        learning: activations of dead features, of as many as take part at a position.
        target: what they are to learn [N, d_model], without b_dec and without a gradient.
        rows: decoder rows [d_sae, d_model].

    Returns:
        Squared error over the target's own square: 1 where the dead do nothing, less as they learn.
    """
    return functional.mse_loss(decode(learning, rows), target) / target.square().mean().clamp(min=1e-12)
