"""Where every walk through the sampler begins, as the engine begins it: text, first noise, timesteps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.sampler import Run, Sampler


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A batch of pictures before its first step."""

    run: Run
    conditioning: tuple[Tensor, Tensor, Tensor]
    """Hidden states [N, tokens, cross_attention_dim], pooled text [N, D], time ids [N, 6]."""


def begin(engine: Engine, captions: Sequence[str], seeds: Sequence[int], steps: int) -> Beginning:
    """Begin a batch at the model's default size; the same seed gives the engine's own first noise."""
    parts, size = engine.components, engine.info.default_size
    text = parts.text.encode_together(captions)
    hidden, pooled = text.hidden, text.pooled
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=hidden.device).expand(len(captions), -1)
    height, width = (edge // parts.vae_downscale for edge in size)
    shape = (parts.unet.config.in_channels, height, width)
    run = Sampler(parts.scheduler, hidden.device).start(steps, seeds, shape, hidden.dtype)
    return Beginning(run, (hidden, pooled, time_ids))
