"""The sampler with a hand on every hook point: an intervention is one function of step, block and update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from turbolens_server.engine.decode import decode_rows
from turbolens_server.engine.engine import Engine
from turbolens_server.sae.sae import Sae
from turbolens_training.activations.taps import HookPointTap, Intervention, begin
from turbolens_training.mini.model import SCALING_FACTOR


@dataclasses.dataclass(frozen=True)
class Walked:
    """What one batch of captions and seeds came to."""

    latents: Tensor  # [N, C, h, w], the final ones
    updates: dict[str, Tensor]
    """By hook point: [T, N, P, d_model] float32, each before its own intervention; empty where not kept."""


def sample(
    engine: Engine,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    *,
    intervene: Intervention | None = None,
    keep: bool = False,
) -> Walked:
    """Walk as `Engine.run` does, with one intervention on the whole batch.

    Args:
        engine: the model.
        captions: one for each picture.
        seeds: likewise.
        steps: denoising steps.
        intervene: called at every step and hook point.
        keep: keep the updates.
    """
    walk = begin(engine, captions, seeds, steps)
    tap = HookPointTap([point.name for point in engine.info.hook_points], keep=keep, intervene=intervene)
    for t in walk.timesteps:
        walk.step(t, tap)
    return Walked(walk.latents, tap.updates())


def thumbnails(latents: Tensor) -> Tensor:
    """Pictures [N, 3, h, w] in [-1, 1] at the latents' resolution; `mini`'s first channels are RGB by construction."""
    return (latents[:, :3].float().cpu() / SCALING_FACTOR).clamp(-1, 1)


@torch.inference_mode()
def decode(engine: Engine, latents: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] by the model's VAE, as they are served: in 8 bits."""
    rows = range(len(latents))
    pictures = [picture for _, picture in decode_rows(engine.components.decoder, latents, rows, [True] * len(latents))]
    finite = [picture for picture in pictures if picture is not None]
    if len(finite) < len(pictures):
        raise FloatingPointError(f"{len(pictures) - len(finite)} of {len(pictures)} pictures are not finite")
    return torch.from_numpy(np.stack(finite)).permute(0, 3, 1, 2).float() / 127.5 - 1


def device_of(engine: Engine) -> torch.device:
    """Where the model is."""
    device: torch.device = next(engine.components.unet.parameters()).device
    return device


def saes_by_block(engine: Engine, *, temporal: bool = False) -> dict[str, Sae]:
    """The engine's SAEs by hook point; `temporal`: some may read whole runs instead of steps.

    Raises:
        ValueError: there is none, a hook point has two, or one is temporal and may not be.
    """
    blocks = [info.hook_point for info in engine.info.saes.values()]
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"one SAE at each hook point is needed; found {', '.join(engine.info.saes) or 'none'}")
    runs = [name for name, sae in engine.saes.items() if sae.bundle.steps is not None]
    if runs and not temporal:
        raise ValueError(f"features are read step by step here, and those of {', '.join(runs)} are of a whole run")
    return {info.hook_point: engine.saes[name] for name, info in engine.info.saes.items()}
