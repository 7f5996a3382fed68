"""The guidance scale as an embedding, for U-Nets that are distilled for guidance."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def embed_guidance(scale: float, width: int) -> Tensor:
    """[1, width] sines and cosines of 1000 (scale - 1), as the pipelines of `diffusers` embed it.

    Args:
        scale: 1 is no guidance.
        width: `time_cond_proj_dim` of the U-Net.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor([scale - 1]) * 1000.0
    angles = angles[:, None] * rates[None]
    embedded = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedded, (0, width - 2 * half))
