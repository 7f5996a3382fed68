"""The model's sampler: any of `diffusers` that takes a pass of the U-Net a step, with a fresh state for each batch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.files import first_line

_ESTIMATES: Final = ("pred_original_sample", "denoised")
"""What samplers call their estimate of the clean latents where they tell it."""
_SOLVES_FOR_CLEAN: Final = ("dpmsolver++", "sde-dpmsolver++", "data_prediction")
"""Algorithms of the multistep solvers that keep such estimates as what they extrapolate from."""
_ONE_PASS: Final = {
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerAncestralDiscreteScheduler",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler",
    "PNDMScheduler": "DDIMScheduler",
}
"""The sampler of one pass that is next to one of several, with the same noise levels."""


_FIRST: Final = 0.9
"""A run that starts below this share of the timesteps gives the model noise where it expects the outlines."""


@dataclasses.dataclass(frozen=True)
class RowStart:
    """What a row starts from."""

    noise: Tensor | None = None
    """Its first noise, [1, C, h, w]; None: drawn."""
    clean: Callable[[torch.Generator], Tensor] | None = None
    """Draws the latents [1, C, h, w] that are noised to where the run begins; None: there is nothing but noise."""


NOISE: Final = RowStart()


class UnsupportedScheduler(ValueError):
    """A sampler that cannot be served; the text names it and says why."""


@dataclasses.dataclass
class SamplerState:
    """One batch on its way from noise to latents."""

    scheduler: Any
    noise: Tensor  # [B, C, h, w], the first noise, of unit variance
    latents: Tensor  # [B, C, h, w]
    more: Mapping[str, Any]
    """Further arguments of a step, such as a generator for each row where the sampler adds noise on the way."""
    skipped: int = 0
    """Steps of the sampler that are not taken."""

    @property
    def timesteps(self) -> Tensor:
        """Timestep of each step, [steps]."""
        timesteps: Tensor = self.scheduler.timesteps[self.skipped :]
        return timesteps

    def scaled(self, t: Tensor) -> Tensor:
        """What the U-Net takes at timestep `t`, [B, C, h, w]."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, t)
        return scaled

    def advance(self, prediction: Tensor, t: Tensor) -> Tensor | None:
        """Take one step; returns the estimate of the clean latents, [B, C, h, w], where the sampler has one."""
        if hasattr(self.scheduler, "model_outputs") or hasattr(self.scheduler, "ets"):
            prediction = prediction.clone()  # kept for the next steps, when the U-Net may have overwritten its own
        stepped = self.scheduler.step(prediction, t, self.latents, **self.more)
        self.latents = stepped.prev_sample
        for name in _ESTIMATES:
            if (told := getattr(stepped, name, None)) is not None:
                estimate: Tensor = told
                return estimate
        config = self.scheduler.config
        if config.get("algorithm_type") in _SOLVES_FOR_CLEAN or config.get("predict_x0"):
            kept: Tensor = self.scheduler.model_outputs[-1]
            return kept
        return None


class Sampler:
    """Starts runs. Timesteps and sigmas are computed once for each number of steps, or list of timesteps."""

    def __init__(self, scheduler: Any, device: torch.device, timesteps: Sequence[int] = ()) -> None:
        """`timesteps` are those of runs of as many steps; the others' are spaced as the scheduler says."""
        self._scheduler = scheduler
        self._device = device
        self._own = {len(timesteps): tuple(timesteps)} if timesteps else {}
        takes = inspect.signature(scheduler.step).parameters
        self._adds_noise = "generator" in takes
        # As SDXL's pipeline passes it: what DDIM and TCD make of the noise on the way unless they are told.
        self._eta = {"eta": 0.0} if "eta" in takes else {}
        self._prepared: dict[int | tuple[int, ...], Any] = {}

    def start(
        self,
        steps: int,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        timesteps: Sequence[int] = (),
        skipped: int = 0,
        starts: Sequence[RowStart] = (),
    ) -> SamplerState:
        """First noise and a sampler for a batch.

        Args:
            steps: of the run.
            seeds: one for each row.
            shape: of one latent, (C, h, w).
            dtype: of the latents.
            timesteps: of all steps, the skipped ones too, falling; empty: the sampler's own.
            skipped: steps before those of the run; then every row needs a start to be noised.
            starts: of each row; empty: noise.
        """
        total = steps + skipped
        key: int | tuple[int, ...] = tuple(timesteps) or self._own.get(total) or total
        if key not in self._prepared:
            fresh = copy.deepcopy(self._scheduler)
            if isinstance(key, tuple):
                fresh.set_timesteps(timesteps=list(key), device=self._device)
            else:
                fresh.set_timesteps(key, device=self._device)
            self._prepared[key] = fresh
        scheduler = _fresh(self._prepared[key])
        # Drawn on the CPU, one generator per picture, as diffusers does: a seed means the same everywhere.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        more = {**self._eta, **({"generator": generators} if self._adds_noise else {})}
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        noises: list[Tensor] = []
        cleans: list[Tensor | None] = []
        for start, generator in zip(starts or [NOISE] * len(seeds), generators, strict=True):
            # Drawn before the noise, as diffusers does.
            cleans.append(None if start.clean is None else start.clean(generator))
            drawn = start.noise
            if drawn is None:
                drawn = torch.randn((1, *shape), generator=generator, dtype=dtype).to(self._device)
            noises.append(drawn)
        noise, first = torch.cat(noises), scheduler.timesteps[skipped : skipped + 1]
        known = [clean for clean in cleans if clean is not None]
        if len(known) == len(cleans):
            # In one go, which keeps the layout in memory that the VAE left: another rounds otherwise in the U-Net.
            latents = scheduler.add_noise(torch.cat(known), noise, first.repeat(len(seeds)))
        else:
            latents = noise * scheduler.init_noise_sigma
            for row, clean in enumerate(cleans):
                if clean is not None:
                    latents[row : row + 1] = scheduler.add_noise(clean, noise[row : row + 1], first)
        return SamplerState(scheduler, noise, latents, more, skipped)


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What a sampler can do beside walking from noise to latents."""

    previews: bool
    """It has an estimate of the clean latents at every step."""
    timesteps: bool
    """It takes timesteps other than those that it would choose."""
    late_starts: Mapping[int, int]
    """First timestep of runs of so many steps, of those that start where the model expects half a picture."""
    pictures: bool
    """It says how a picture is noised to where a run may start."""


def check_scheduler(scheduler: Any, max_steps: int, timesteps: Sequence[int] = ()) -> Abilities:
    """What a sampler can do; step numbers and the ranges of edits count passes of the U-Net.

    Args:
        scheduler: of `diffusers`.
        max_steps: most steps of a run.
        timesteps: those of runs of as many steps.

    Raises:
        UnsupportedScheduler: a run would not be one pass of the U-Net a step, from noise to latents.
    """
    name = type(scheduler).__name__
    relative = _ONE_PASS.get(name)
    use = f"use --scheduler {relative}, which takes one and has the same noise levels" if relative else ""
    previews, takes, late = True, _takes_timesteps(scheduler), {}
    if timesteps and not takes:
        raise UnsupportedScheduler(f"scheduler {name} chooses its own timesteps as it is configured")
    for steps in range(1, max_steps + 1):
        taken = f"{steps} step{'s' if steps > 1 else ''}"
        way_out = " or ".join(filter(None, (f"lower --max-steps to {steps - 1}" if steps > 1 else "", use)))
        way_out = f"; {way_out}" if way_out else ""
        try:
            run = Sampler(scheduler, torch.device("cpu"), timesteps).start(steps, [0], (4, 8, 8), torch.float32)
            visited = run.timesteps.tolist()
            for t in run.timesteps if len(visited) == steps else ():
                previews &= run.advance(torch.zeros_like(run.scaled(t)), t) is not None
        except Exception as error:  # each sampler has its own way to refuse a number of steps
            raise UnsupportedScheduler(
                f"scheduler {name} cannot take {taken} ({first_line(error)}){way_out}"
            ) from error
        if len(visited) != steps:
            raise UnsupportedScheduler(
                f"scheduler {name} takes {len(visited)} passes of the U-Net for {taken}{way_out}"
            )
        if any(later >= earlier for earlier, later in itertools.pairwise(visited)):
            raise UnsupportedScheduler(f"scheduler {name} goes from pictures to noise: its timesteps rise")
        if not torch.isfinite(run.latents).all():
            raise UnsupportedScheduler(f"scheduler {name} gives values that are not finite in {taken}{way_out}")
        if visited[0] < _FIRST * scheduler.config.num_train_timesteps and steps != len(timesteps):
            late[steps] = int(visited[0])
    return Abilities(previews, takes, late, hasattr(scheduler, "add_noise"))


def _takes_timesteps(scheduler: Any) -> bool:
    """Whether a sampler takes timesteps from outside; some have the argument, and settings that forbid it."""
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        return False
    try:
        copy.deepcopy(scheduler).set_timesteps(timesteps=[scheduler.config.num_train_timesteps - 1])
    except Exception:  # each has its own way to say no
        return False
    return True


def _fresh(prepared: Any) -> Any:
    """A sampler of its own for a run, which moves it on; some write past outputs into lists, none into tensors."""
    scheduler = copy.copy(prepared)
    for name, value in vars(prepared).items():
        if isinstance(value, list | dict):
            setattr(scheduler, name, copy.copy(value))
    return scheduler
