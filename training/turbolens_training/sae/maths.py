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
_SHORT: Final = 256
"""Numbers among which NumPy finds the largest in less time than PyTorch: of 64, in a third of it."""


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


@dataclasses.dataclass(frozen=True)
class ByFeature:
    """Entries [M] of a matrix [N, d_sae], on the CPU, in order of feature: what both weight gradients are summed by."""

    order: Tensor  # [M] int64, of the entries
    positions: Tensor  # [M] int64, in that order
    offsets: Tensor  # [d_sae] int64, where each feature begins

    @classmethod
    def of(cls, features: Tensor, positions: Tensor, d_sae: int) -> ByFeature:
        """Sort entries, given feature and position of each, both [M]; equal ones stay in order, so that a run repeats
        its bits."""
        # NumPy sorts numbers of 16 bits by their digits, an eighth of the time of PyTorch's sort.
        small = d_sae <= 1 << 16
        keys = features.numpy().astype(np.uint16 if small else np.int64)
        order = torch.from_numpy(np.argsort(keys, kind="stable"))
        return cls(order, positions[order], starts(features.bincount(minlength=d_sae)))

    def sum(self, values: Tensor, rows: Tensor) -> Tensor:
        """Of each feature, its entries' rows [N, d] by their values [M]: -> [d_sae, d]."""
        return functional.embedding_bag(
            self.positions, rows, self.offsets, per_sample_weights=values[self.order], mode="sum"
        )


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
            entries = ByFeature.of(features, positions, W_enc.shape[1])
            return None, *_of_encoder(gradient._values(), features, entries, x, W_enc, b_dec), None
        of_bias = gradient.sum(0)
        return None, (gradient.T @ x).addr_(of_bias, b_dec, alpha=-1).T, of_bias, -(W_enc @ of_bias), None


def _of_encoder(
    values: Tensor, features: Tensor, entries: ByFeature, x: Tensor, W_enc: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc, b_enc and b_dec, given those of pre-activations: values and features of entries, [M]."""
    of_bias = x.new_zeros(W_enc.shape[1]).scatter_add_(0, features, values)
    of_rows = entries.sum(values, x).addr_(of_bias, b_dec, alpha=-1)
    return of_rows.T, of_bias, -(W_enc @ of_bias)


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


def select(pre: Tensor, features: Tensor) -> Tensor:
    """Pre-activations of chosen features at each position: [N, d_sae], [N, m] int64 -> [N, m].

    On a CPU the gradient of what :func:`pre_activations` gave is sparse: as it is zero elsewhere, that spares the
    backward pass a product as large as the forward pass's.
    """
    sparse = pre.device.type == "cpu" and pre.grad_fn is not None and pre.grad_fn.name() == "_PreActivationsBackward"
    return pre.gather(1, features, sparse_grad=sparse)


def rectangular(values: Tensor, features: Tensor) -> Active:
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
    best = _places(pre.view(-1, _ROUND, groups).amax(1), k)
    left = (best[:, None] + groups * torch.arange(_ROUND)[:, None]).flatten(1)
    return left.gather(1, _places(pre.gather(1, left), k))


def _places(x: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, in any order, on the CPU: [N, n] -> [N, k]."""
    if k == 0 or x.shape[1] > _SHORT:
        return x.topk(k, dim=1, sorted=False).indices
    return torch.from_numpy(np.argpartition(x.numpy(), -k, axis=1)[:, -k:])


def top_k(pre: Tensor, k: int) -> Active:
    """The k largest pre-activations of each position, and then their positive part: [N, d_sae] -> N k entries."""
    features = largest(pre.detach(), k)
    return rectangular(select(pre, features).relu(), features)


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
        positions = torch.searchsorted(offsets, torch.arange(len(values)), right=True) - 1
        of_rows = ByFeature.of(features, positions, ctx.d_sae).sum(values, gradient)
        return gradient, of_rows, None, None, None


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


class _TopKLoss(torch.autograd.Function):
    """A TopK's squared error, with all gradients in one piece: tensors as large as the batch are spared, and what is
    selected is sorted by feature once, for the encoder and for the decoder."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        pre = torch.addmm(b_enc - b_dec @ W_enc, x, W_enc)
        features = largest(pre, k)
        with torch.enable_grad():
            values = pre.gather(1, features).relu_().requires_grad_()
            decoded = _sum_of_rows(rectangular(values, features), W_dec.detach())
        error = decoded.detach().add_(b_dec).sub_(x)
        loss = error.flatten().dot(error.flatten()) / error.numel()
        ctx.save_for_backward(x, W_enc, b_dec, features, error)
        ctx.values, ctx.decoded = values, decoded
        kept = values.detach()
        ctx.mark_non_differentiable(pre, features, kept, error)
        return loss, pre, features, kept, error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, Tensor, None]:
        x, W_enc, b_dec, features, error = ctx.saved_tensors
        gradient = error * (gradients[0] * 2 / error.numel())
        (of_values,) = torch.autograd.grad(ctx.decoded, ctx.values, gradient)
        values = ctx.values.detach()
        of_values = (of_values * (values > 0)).flatten()
        positions = torch.arange(len(x)).repeat_interleave(values.shape[1])
        entries = ByFeature.of(features.flatten(), positions, W_enc.shape[1])
        of_encoder, of_bias, of_centre = _of_encoder(of_values, features.flatten(), entries, x, W_enc, b_dec)
        of_rows = entries.sum(values.flatten(), gradient)
        return None, of_encoder, of_bias, of_rows, of_centre + gradient.sum(0), None


def top_k_loss(weights: SaeWeights, x: Tensor, k: int) -> tuple[Tensor, Tensor, Active, Tensor]:
    """What :func:`pre_activations`, :func:`top_k`, :func:`decode` and :func:`reconstruction_loss` give one after the
    other, in less time on a CPU.

    Returns:
        The loss; without a gradient the pre-activations [N, d_sae], what is selected, and the error: the reconstruction
        without x, [N, d_model].
    """
    loss, pre, features, values, error = _TopKLoss.apply(  # type: ignore[no-untyped-call]
        x, weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec, k
    )
    return loss, pre, rectangular(values, features), error
