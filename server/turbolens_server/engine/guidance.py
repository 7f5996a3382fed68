"""Guidance: of two predictions of one walk, and as an embedding for U-Nets that are distilled for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turbolens_server.engine.types import Guidance


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


def guide(cond: Tensor, uncond: Tensor, guidance: Guidance) -> Tensor:
    """Two predictions [B, C, h, w] as one: uncond + scale (cond - uncond), as the pipelines of `diffusers` reckon.

    Rescaled, a share of it gets the standard deviation of `cond` (arXiv 2305.08891, section 3.4), each row its own.
    """
    guided = uncond + guidance.scale * (cond - uncond)
    if guidance.rescale:
        over = (1, 2, 3)
        like_cond = guided * (cond.std(over, keepdim=True) / guided.std(over, keepdim=True))
        guided = guidance.rescale * like_cond + (1 - guidance.rescale) * guided
    return guided


@dataclasses.dataclass(frozen=True)
class _Alike:
    """Guided walks of one guidance."""

    guidance: Guidance
    walks: Tensor  # [n] int64, their rows among the walks
    second: Tensor  # [n] int64, their second lanes' rows among the lanes


class Sides:
    """The second lanes of a batch: what the U-Net sees of walks with guidance, and how it becomes one prediction."""

    def __init__(self, guidance: Sequence[Guidance | None], device: torch.device) -> None:
        """`guidance` of each walk; the second lanes of those that have any follow all the first, in order."""
        rows = [row for row, one in enumerate(guidance) if one is not None]
        self._walks = len(guidance)
        self._guided = torch.tensor(rows, dtype=torch.int64, device=device)
        self._alike = []
        for one in dict.fromkeys(one for one in guidance if one is not None):
            at = [place for place, row in enumerate(rows) if guidance[row] == one]
            walks = torch.tensor([rows[place] for place in at], device=device)
            self._alike.append(_Alike(one, walks, torch.tensor(at, device=device) + self._walks))

    def split(self, walks: Tensor) -> Tensor:
        """A row for each lane, of one for each walk."""
        return torch.cat([walks, walks[self._guided]]) if self._alike else walks

    def join(self, lanes: Tensor) -> Tensor:
        """A prediction for each walk, of one for each lane."""
        if not self._alike:
            return lanes
        joined = lanes[: self._walks].clone()
        for alike in self._alike:
            joined[alike.walks] = guide(lanes[alike.walks], lanes[alike.second], alike.guidance)
        return joined
