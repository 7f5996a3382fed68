"""The maths of learned region gates (MaskAttn-SDXL, Chang et al., arXiv 2509.15357), as pure functions.

    g(p, t) = sigmoid(<f(x_p), e(c_t)> / sqrt(h) + b)     f, e: LayerNorm, linear, SiLU, linear
    open(p, t) = g(p, t) > threshold; where no token of a row is, the one of the largest g
    bias(p, t) = 0 where open, else `closed`, added to the logits of every head before their softmax

The paper leaves the two networks open; these are those of the authors' code. In training the gate's gradient is g's own
(straight through the threshold). `twin.py` is the slow twin.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_EPS: Final = 1e-5


class GateMlp(NamedTuple):
    """LayerNorm over d, a linear map to h, SiLU, a linear map to h."""

    norm_weight: Tensor  # [d]
    norm_bias: Tensor  # [d]
    in_weight: Tensor  # [h, d]
    in_bias: Tensor  # [h]
    out_weight: Tensor  # [h, h]
    out_bias: Tensor  # [h]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., h]."""
        normed = F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias, _EPS)
        return F.linear(F.silu(F.linear(normed, self.in_weight, self.in_bias)), self.out_weight, self.out_bias)


class GateHead(NamedTuple):
    """The two networks of a gate, float32."""

    features: GateMlp
    """Of what the positions bring to a cross-attention."""
    tokens: GateMlp
    """Of the text's hidden states."""
    bias: Tensor  # []


def gate_probabilities(features: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
    """How likely each position is to hear each token.

    Args:
        features: of the positions, by a head's network, [B, P, h].
        tokens: of the text, by the other, [B, T, h].
        bias: [].

    Returns:
        [B, P, T], 0 to 1.
    """
    return torch.sigmoid(features @ tokens.transpose(1, 2) * features.shape[-1] ** -0.5 + bias)


def open_gates(probabilities: Tensor, threshold: float, heard: Tensor | None = None) -> Tensor:
    """Which tokens each position hears: those above the threshold, and where none is, the likeliest.

    Args:
        probabilities: [B, P, T].
        threshold: 0 to 1.
        heard: tokens that may be heard at all, [B, P, T] bool; None: every one. In each row at least one.

    Returns:
        [B, P, T] bool, true in every row at least once.
    """
    likely = probabilities if heard is None else probabilities.masked_fill(~heard, -1.0)
    best = torch.zeros_like(likely, dtype=torch.bool).scatter_(-1, likely.argmax(-1, keepdim=True), True)
    found = likely > threshold
    return torch.where(found.any(-1, keepdim=True), found, best)


def straight_through(probabilities: Tensor, opened: Tensor) -> Tensor:
    """The gates as 0 and 1, [B, P, T], whose gradient is that of the probabilities."""
    return opened.to(probabilities.dtype) + (probabilities - probabilities.detach())  # 0 exactly, and no rounding


def gate_bias(gates: Tensor, closed: float) -> Tensor:
    """What gates of 0 and 1, [B, P, T], add to logits: 0 where open, `closed` where not."""
    return (1 - gates) * closed
