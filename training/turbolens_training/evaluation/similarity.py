"""How alike two pictures are, without a judge model."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

_WINDOW: Final = 11
_SIGMA: Final = 1.5
_LUMA: Final = (0.299, 0.587, 0.114)


def gaussian_window() -> Tensor:
    """The window of SSIM, [11, 11] float64, sum 1."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    return torch.outer(line, line) / line.sum().square()


def luma(pictures: Tensor) -> Tensor:
    """Brightness [N, h, w] in [0, 1] of RGB pictures [N, 3, h, w] in [-1, 1], float64 (ITU-R BT.601)."""
    return torch.einsum("nchw,c->nhw", (pictures.double() + 1) / 2, torch.tensor(_LUMA, dtype=torch.float64))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [N] of pictures [N, 3, h, w] in [-1, 1], on their brightness; h and w at least 11.

    Wang et al. 2004, with its 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01 and K2 = 0.03, over whole windows.
    """
    x, y = luma(a)[:, None], luma(b)[:, None]
    window = gaussian_window()[None, None]

    def mean(z: Tensor) -> Tensor:
        return functional.conv2d(z, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean((1, 2, 3))
