"""The sampler of SDXL Turbo without `diffusers`, whose import takes longer than PyTorch's own.

Its schedules are those that `diffusers` made at an earlier start; its steps are written out here. The slow twin is
`diffusers.EulerAncestralDiscreteScheduler`: tests hold every value to it, bit for bit.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PREDICTIONS = ("epsilon", "v_prediction")


class Schedule(NamedTuple):
    """A run's timesteps, falling, and its noise levels, one more and the last of them 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


class Stepped(NamedTuple):
    """What a step gives, both [B, C, h, w]."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class _Config(types.SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class EulerAncestralDiscreteScheduler:
    """As the one of this name in `diffusers`, on a CPU, for the numbers of steps whose schedules are known."""

    def __init__(self, config: Mapping[str, Any], schedules: Mapping[int, Schedule]) -> None:
        """`config` is that of the one in `diffusers`; its `prediction_type` is "epsilon" or "v_prediction"."""
        self.config = _Config(**config)
        if self.config.prediction_type not in _PREDICTIONS:
            raise ValueError(f"prediction_type={self.config.prediction_type!r}, expected one of {_PREDICTIONS}")
        self._schedules = dict(schedules)
        self.timesteps = self.sigmas = torch.zeros(0)
        self._begin = self._at = 0

    @classmethod
    def like(cls, scheduler: Any, most: int) -> EulerAncestralDiscreteScheduler | None:
        """The same with the schedules of 1 to `most` steps; None of another kind."""
        if type(scheduler).__name__ != cls.__name__ or scheduler.config.prediction_type not in _PREDICTIONS:
            return None
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        made = type(scheduler).from_config(scheduler.config)
        schedules = {}
        for steps in range(1, most + 1):
            made.set_timesteps(steps)
            schedules[steps] = Schedule(tuple(made.timesteps.tolist()), tuple(made.sigmas.tolist()))
        return cls(config, schedules)

    @property
    def schedules(self) -> Mapping[int, Schedule]:
        """By number of steps."""
        return self._schedules

    @property
    def init_noise_sigma(self) -> Tensor:
        """What the first noise is multiplied by."""
        largest = self.sigmas.max()
        return largest if self.config.timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5

    def set_timesteps(self, steps: int, device: torch.device | None = None) -> None:  # the CPU
        """Begin a run of so many steps."""
        schedule = self._schedules[steps]
        self.timesteps, self.sigmas = (torch.tensor(values, dtype=torch.float32) for values in schedule)
        self._begin = self._at = 0

    def set_begin_index(self, begin: int) -> None:
        """Begin it at a later step."""
        self._begin = self._at = begin

    def scale_model_input(self, sample: Tensor, _: Tensor) -> Tensor:
        """What the U-Net takes at this step, [B, C, h, w]."""
        scaled: Tensor = sample / ((self.sigmas[self._at] ** 2 + 1) ** 0.5)
        return scaled

    def step(self, prediction: Tensor, _: Tensor, sample: Tensor, generator: Sequence[torch.Generator]) -> Stepped:
        """Take it; `generator` draws the noise of each row."""
        sigma, sigma_to = self.sigmas[self._at], self.sigmas[self._at + 1]
        sample = sample.to(torch.float32)
        if self.config.prediction_type == "epsilon":
            clean = sample - sigma * prediction
        else:
            clean = prediction * (-sigma / (sigma**2 + 1) ** 0.5) + (sample / (sigma**2 + 1))
        sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        derivative = (sample - clean) / sigma
        stepped = sample + derivative * (sigma_down - sigma)
        row = (1, *prediction.shape[1:])
        noise = torch.cat([torch.randn(row, generator=one, dtype=prediction.dtype) for one in generator])
        self._at += 1
        return Stepped((stepped + noise * sigma_up).to(prediction.dtype), clean)

    def add_noise(self, clean: Tensor, noise: Tensor, _: Tensor) -> Tensor:
        """Latents noised to where the run begins, [B, C, h, w]."""
        noised: Tensor = clean + noise * self.sigmas.to(clean.dtype)[self._begin]
        return noised
