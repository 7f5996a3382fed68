"""The model's own sampler, with a fresh state for every batch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class UnsupportedScheduler(ValueError):
    """A sampler that cannot be served; the text names it and says why."""


@dataclasses.dataclass
class SamplerState:
    """One batch on its way from noise to latents."""

    scheduler: Any
    noise: Tensor  # [B, C, h, w], the first noise, of unit variance
    latents: Tensor  # [B, C, h, w]
    generators: list[torch.Generator] | None
    """One for each row; None where the sampler adds no noise on the way."""

    @property
    def timesteps(self) -> Tensor:
        """Timestep of each step, [steps]."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def scaled(self, t: Tensor) -> Tensor:
        """What the U-Net takes at timestep `t`, [B, C, h, w]."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, t)
        return scaled

    def advance(self, prediction: Tensor, t: Tensor) -> Tensor:
        """Take one step; returns the model's estimate of the clean latents, [B, C, h, w]."""
        extra = {} if self.generators is None else {"generator": self.generators}
        stepped = self.scheduler.step(prediction, t, self.latents, **extra)
        self.latents = stepped.prev_sample
        estimate: Tensor = stepped.pred_original_sample
        return estimate


class Sampler:
    """Starts runs. Timesteps and sigmas are computed once for each number of steps."""

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        self._scheduler = scheduler
        self._device = device
        self._adds_noise = "generator" in inspect.signature(scheduler.step).parameters
        self._prepared: dict[int, Any] = {}

    def start(self, steps: int, seeds: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype) -> SamplerState:
        """First noise and a sampler for a batch; `shape` is that of one latent, (C, h, w)."""
        if steps not in self._prepared:
            fresh = type(self._scheduler).from_config(self._scheduler.config)
            fresh.set_timesteps(steps, device=self._device)
            self._prepared[steps] = fresh
        scheduler = _fresh(self._prepared[steps])
        # Drawn on the CPU, one generator per picture, as diffusers does: a seed means the same everywhere.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = randn_tensor((len(seeds), *shape), generator=generators, device=self._device, dtype=dtype)
        return SamplerState(
            scheduler, noise, noise * scheduler.init_noise_sigma, generators if self._adds_noise else None
        )


def check_scheduler(scheduler: Any, max_steps: int) -> None:
    """Raise UnsupportedScheduler where a run would not be one pass of the U-Net and one estimate a step.

    Step numbers and the ranges of edits count passes, and previews and pictures of every step show estimates. Many
    samplers of `diffusers` tell no estimate, and some call the U-Net more often than they have steps.
    """
    name, use = type(scheduler).__name__, "use another, such as EulerAncestralDiscreteScheduler"
    for steps in range(1, max_steps + 1):
        taken = f"{steps} step{'s' if steps > 1 else ''}"
        way_out = use if steps == 1 else f"lower --max-steps to {steps - 1}, or {use}"
        try:
            run = Sampler(scheduler, torch.device("cpu")).start(steps, [0], (4, 8, 8), torch.float32)
            passes, t = len(run.timesteps), run.timesteps[0]
            told = passes != steps or run.advance(torch.zeros_like(run.scaled(t)), t) is not None
        except AttributeError:
            told = False
        except Exception as error:  # each sampler has its own way to refuse a number of steps
            why = " ".join(str(error).split())[:200]
            raise UnsupportedScheduler(f"scheduler {name} cannot take {taken} ({why}); {way_out}") from error
        if not told:
            raise UnsupportedScheduler(f"scheduler {name} gives no estimate of the picture at each step; {use}")
        if passes != steps:
            raise UnsupportedScheduler(f"scheduler {name} takes {passes} passes for {taken}; {way_out}")


def _fresh(prepared: Any) -> Any:
    """A sampler of its own for a run, which moves it on; some write past outputs into lists, none into tensors."""
    scheduler = copy.copy(prepared)
    for name, value in vars(prepared).items():
        if isinstance(value, list | dict):
            setattr(scheduler, name, copy.copy(value))
    return scheduler
