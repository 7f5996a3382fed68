"""What gates are trained on: captioned scenes of two things, noised, with what the model should predict."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.unet.conditions import Conditions
from turbolens_training.activations.taps import begin
from turbolens_training.mini.captions import describe
from turbolens_training.mini.model import SCALING_FACTOR
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import COUNT, decode_scenes, jitter_from_noise, sample_codes
from turbolens_training.mini.train import OTHER_TIMESTEPS, anchored_latent

_FIRST = 999


@dataclasses.dataclass(frozen=True)
class Batch:
    """Noised latents and the answer."""

    sample: Tensor  # [B, 4, h, w]
    timesteps: Tensor  # [B]
    conditions: Conditions
    target: Tensor  # [B, 4, h, w], by the scheduler's kind of prediction


class TwoThingScenes:
    """Batches of scenes of two things; one is a function of (seed, split, index)."""

    def __init__(self, engine: Engine, seed: int, split: str, batch: int, one_step_share: float) -> None:
        self._engine = engine
        self._of = f"{seed}/gates/{split}"
        self._batch = batch
        self._at_first = round(batch * one_step_share)

    def __call__(self, index: int) -> Batch:
        """Batch `index`."""
        parts, rng = self._engine.components, random.Random(f"{self._of}/{index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        pool = sample_codes(4 * self._batch + 32, generator)  # 60 % have two
        codes = pool[pool[:, COUNT] == 2][: self._batch]
        captions = [describe(scene, rng) for scene in decode_scenes(codes)]
        height, width = (edge // parts.vae_downscale for edge in self._engine.info.default_size)
        noise = torch.randn(len(codes), parts.unet.config.in_channels, height, width, generator=generator)
        picture, cover = render(codes, jitter_from_noise(noise), 2 * height)
        clean = anchored_latent(picture, cover, height) * SCALING_FACTOR
        timesteps = torch.tensor(
            [_FIRST] * self._at_first + rng.choices(OTHER_TIMESTEPS, k=len(codes) - self._at_first)
        )
        device = self._engine.device
        alpha = parts.scheduler.alphas_cumprod.cpu()[timesteps][:, None, None, None]
        sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        kind = parts.scheduler.config.prediction_type
        target = {
            "epsilon": noise,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
            "sample": clean,
        }[kind]
        return Batch(sample.to(device), timesteps.to(device), self._heard(captions), target.to(device))

    def _heard(self, captions: list[str]) -> Conditions:
        """As the engine makes it, as tensors that gradients may pass."""
        heard = begin(self._engine, captions, [0] * len(captions), 1).conditions
        return Conditions(heard.hidden.clone(), heard.pooled.clone(), heard.time_ids.clone())
