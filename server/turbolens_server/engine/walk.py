"""The one walk from noise to latents: serving, training, evaluation and the benchmarks differ in the tap alone."""

from __future__ import annotations

import torch
from torch import Tensor

from turbolens_server.engine.guidance import Sides
from turbolens_server.engine.sampler import SamplerState
from turbolens_server.unet.backend import Tap, UNetBackend
from turbolens_server.unet.conditions import Conditions


class Walk:
    """One batch on its way from noise to latents, by whatever backend serves. Of a walk with guidance the U-Net sees
    two lanes."""

    def __init__(self, unet: UNetBackend, state: SamplerState, conditions: Conditions, sides: Sides) -> None:
        self._unet = unet
        self._state = state
        self._sides = sides
        self.conditions = conditions

    @property
    def timesteps(self) -> Tensor:
        """Timestep of each step, [steps], falling."""
        return self._state.timesteps

    @property
    def noise(self) -> Tensor:
        """The first noise, [B, C, h, w], of unit variance."""
        return self._state.noise

    @property
    def latents(self) -> Tensor:
        """Where the walk is, [B, C, h, w]."""
        return self._state.latents

    @torch.inference_mode()
    def step(self, t: Tensor, tap: Tap) -> Tensor | None:
        """Take the step at timestep `t`; returns the estimate of the clean latents, [B, C, h, w], if there is one."""
        prediction = self._unet.predict(self._sides.split(self._state.scaled(t)), t, self.conditions, tap)
        return self._state.advance(self._sides.join(prediction), t)

    @torch.inference_mode()
    def look(self, t: Tensor, tap: Tap) -> None:
        """Show the tap the updates at timestep `t` without taking the step: the pass may end after the last of them."""
        self._unet.read(self._sides.split(self._state.scaled(t)), t, self.conditions, tap)
