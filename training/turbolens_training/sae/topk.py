"""The maths of a TopK SAE: encode, decode, and the two losses, as pure functions.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), equations 1 to 3 and appendix A.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_server.sae.bundle import SaeWeights

DATA_SHARE: Final = 4 / 3
"""How much of a first decoder row is a token, to 1 of noise: 0.8 of it, once normalised."""


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


def pre_activations(weights: SaeWeights, x: Tensor) -> Tensor:
    """W_enc (x - b_dec) + b_enc: [N, d_model] -> [N, d_sae]."""
    return torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row and then their positive part: values and indices [N, k]."""
    values, indices = pre.topk(k, dim=1, sorted=False)
    return values.relu(), indices


def gather_decode(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Sum of decoder rows by activation, without a bias: [N, k] -> [N, d_model]."""
    return functional.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def reconstruction_loss(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error per dimension; on normalised updates, the fraction of variance unexplained."""
    return (reconstruction - x).square().mean()


def auxk_loss(dead_pre: Tensor, residual: Tensor, dead_rows: Tensor) -> Tensor:
    """AuxK: the dead features alone reconstruct what the live ones left over.

    Args:
        dead_pre: pre-activations of the dead features [N, D]; -inf where one takes no part.
        residual: x minus its reconstruction [N, d_model]; detached here, so that live features feel nothing of it.
        dead_rows: their decoder rows [D, d_model].

    Returns:
        Squared error of the residual over the residual's own square: 1 where the dead do nothing, less as they
        learn. No bias takes part: the residual is free of it.
    """
    target = residual.detach()
    dead, d_model = dead_rows.shape
    if dead > d_model // 2:  # k_aux = min(d_model / 2, dead)
        best, indices = dead_pre.topk(d_model // 2, dim=1, sorted=False)
        dead_pre = torch.full_like(dead_pre, -torch.inf).scatter(1, indices, best)
    # Dense: with tens of active features a position, gathering rows costs more than multiplying by zeros.
    error = dead_pre.relu() @ dead_rows - target
    return error.square().mean() / target.square().mean().clamp(min=1e-12)
