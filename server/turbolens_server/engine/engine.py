"""One process, one device, one engine: lists of jobs in, pictures and features out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from turbolens_server.engine.plan import BatchPlan, StepTap
from turbolens_server.engine.text import TextEncoder
from turbolens_server.engine.types import (
    FeaturesReady,
    HookPoint,
    Job,
    OnEvent,
    Result,
    SparseCodes,
    StepDone,
)
from turbolens_server.sae.bundle import Bundle
from turbolens_server.sae.sae import Sae
from turbolens_server.unet.backend import UNetBackend


@dataclasses.dataclass(frozen=True)
class SaeInfo:
    """An SAE as served."""

    name: str
    hook_point: str
    bundle: Bundle
    forced: bool
    """Trained on another model than the one served, and the operator insisted."""


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What an engine serves."""

    model: str
    model_hash: str
    hook_points: tuple[HookPoint, ...]
    saes: dict[str, SaeInfo]
    """By name, in order of their blocks in the U-Net."""
    default_steps: int
    max_steps: int
    default_size: tuple[int, int]
    """(height, width) in pixels."""
    sizes: tuple[tuple[int, int], ...]
    max_prompt_tokens: int
    backend: str
    """What runs the U-Net."""
    backend_reason: str
    """Why it is this one."""
    device: str
    dtype: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of a loaded model, as `diffusers` made them."""

    text: TextEncoder
    unet: Any
    vae: Any
    scheduler: Any
    vae_downscale: int


def _silent(_: object) -> None:
    """The event callback of callers who want none."""


def _never(_: int) -> bool:
    """The cancellation check of callers who never cancel."""
    return False


class Engine:
    """Runs batches of jobs. Every call must come from one thread; nothing is kept between calls but a text cache."""

    def __init__(
        self, components: Components, unet: UNetBackend, info: EngineInfo, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.info = info
        self._parts = components
        self._unet = unet
        self._device = device
        self._dtype = dtype
        self._saes = {name: Sae(sae.bundle, device) for name, sae in info.saes.items()}
        self._order = {point.name: rank for rank, point in enumerate(info.hook_points)}

    @property
    def components(self) -> Components:
        """The model's parts, for training and tests."""
        return self._parts

    @property
    def saes(self) -> Mapping[str, Sae]:
        """The SAEs by name, ready to run."""
        return self._saes

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Pooled text embeddings of the model's own encoder, unit norm, [n, d]."""
        pooled = torch.cat([self._parts.text.encode(text).pooled for text in texts]).float().cpu()
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    @torch.inference_mode()
    def run(
        self,
        jobs: Sequence[Job],
        *,
        on_event: OnEvent | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Result | None]:
        """Run a batch of jobs that share steps and size; each has its own prompt, seed, edits and wanted features.

        Args:
            jobs: at least one.
            on_event: called in this thread as steps end, features are computed and pictures are ready.
            cancelled: asked for each job before each step; a job once cancelled gives None. Its slot stays in the
                batch, so that its mates' results do not change; a batch with no job left stops at the next step.

        Returns:
            One result for each job, in order.
        """
        first = jobs[0]
        if any((job.steps, job.height, job.width) != (first.steps, first.height, first.width) for job in jobs):
            raise ValueError("jobs of one batch share steps, height and width")
        emit, is_cancelled = on_event or _silent, cancelled or _never
        parts = self._parts

        texts = [parts.text.encode(job.prompt) for job in jobs]
        hidden = torch.cat([text.hidden for text in texts])
        pooled = torch.cat([text.pooled for text in texts])
        height, width = first.height // parts.vae_downscale, first.width // parts.vae_downscale
        size = (first.height, first.width)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=self._device).repeat(len(jobs), 1)

        scheduler = type(parts.scheduler).from_config(parts.scheduler.config)
        scheduler.set_timesteps(first.steps, device=self._device)
        # Drawn on the CPU, one generator per picture, as diffusers does: a seed means the same everywhere.
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        shape = (len(jobs), parts.unet.config.in_channels, height, width)
        latents = randn_tensor(shape, generator=generators, device=self._device, dtype=hidden.dtype)
        latents = latents * scheduler.init_noise_sigma
        accepts = set(inspect.signature(scheduler.step).parameters)
        extra = {"generator": generators} if "generator" in accepts else {}

        plan = BatchPlan(jobs, self.info, self._saes, self._device, scheduler.timesteps.tolist())
        live = [not is_cancelled(row) for row in range(len(jobs))]
        features: list[list[SparseCodes]] = [[] for _ in jobs]
        for step, t in enumerate(scheduler.timesteps):
            live = [alive and not is_cancelled(row) for row, alive in enumerate(live)]
            if not any(live):
                return [None] * len(jobs)
            tap = StepTap(plan, step)
            scaled = scheduler.scale_model_input(latents, t)
            prediction = self._unet.predict(scaled, t, hidden, pooled, time_ids, tap)
            stepped = scheduler.step(prediction, t, latents, **extra)
            latents = stepped.prev_sample
            for row, codes in tap.collect():
                if live[row]:
                    features[row].append(codes)
                    emit(FeaturesReady(row, codes))
            for row, job in enumerate(jobs):
                if live[row]:
                    wanted = job.previews and step < first.steps - 1
                    preview = self._decode(stepped.pred_original_sample[row : row + 1])[0] if wanted else None
                    emit(StepDone(row, step, first.steps, preview))

        live = [alive and not is_cancelled(row) for row, alive in enumerate(live)]
        decode = [row for row, job in enumerate(jobs) if live[row] and job.picture]
        pictures = dict(zip(decode, self._decode(latents[decode]), strict=True)) if decode else {}
        results: list[Result | None] = []
        for row in range(len(jobs)):
            if not live[row]:
                results.append(None)
                continue
            latent = latents[row].float().cpu().numpy()
            result = Result(row, pictures.get(row), latent, tuple(features[row]), texts[row].tokens_cut)
            results.append(result)
            emit(result)
        return results

    def _decode(self, latents: Tensor) -> list[npt.NDArray[np.uint8]]:
        """Latents [B, C, h, w] as pictures [height, width, 3].

        Raises:
            FloatingPointError: the VAE's output is not finite, as half-precision VAEs can make it.
        """
        vae = self._parts.vae
        config = vae.config
        latents = latents.to(vae.dtype)
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (torch.tensor(v, device=latents.device, dtype=latents.dtype)[None, :, None, None]
                         for v in (config.latents_mean, config.latents_std))  # fmt: skip
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        decoded = vae.decode(latents, return_dict=False)[0].float()
        if not torch.isfinite(decoded).all():
            raise FloatingPointError(
                f"the VAE gave values that are not finite in {vae.dtype}; serve with another --vae"
            )
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).cpu().numpy())
