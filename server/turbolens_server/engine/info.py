"""What an engine serves, and what that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from turbolens_server.gating.bundle import GateBundle
from turbolens_server.gating.gates import Gates
from turbolens_server.sae.bundle import Bundle
from turbolens_server.unet.points import HookPoint

_GIB: Final = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """What serving takes, in bytes, beside what was free."""

    weights: int
    """Of the model's parts."""
    saes: int
    """Weights of the SAEs."""
    activations: int
    """Estimated, of the largest batch; on a pipelined device that of its U-Net and of its VAE together. With it, the
    encoded prompts that are kept."""
    available: int | None
    """Free when loading began; None where the platform does not tell."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.saes + self.activations

    def refusal(self, where: str, batch: str) -> str | None:
        """Why this does not fit, with both numbers and the way out; None where it fits or nothing is known.

        Args:
            where: the device.
            batch: the largest batch in words.
        """
        if self.available is None or self.total <= self.available:
            return None
        parts = (("weights", self.weights), ("SAEs", self.saes), (batch, self.activations))
        shown = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts)
        return (
            f"needs about {self.total / _GIB:.2f} GiB ({shown}), and {self.available / _GIB:.2f} GiB are free on "
            f"{where}; lower --max-batch, serve fewer --sae, or use --dtype float16 or bfloat16"
        )


@dataclasses.dataclass(frozen=True)
class LoraInfo:
    """A LoRA that is fused into the model's weights."""

    name: str
    weight: float
    hash: str
    """SHA-256 of its file."""


@dataclasses.dataclass(frozen=True)
class SaeInfo:
    """An SAE as served."""

    name: str
    hook_point: str
    bundle: Bundle
    forced: bool
    """Trained on another model than the one served, and the operator insisted."""
    source: str = ""
    """What `--sae` said; empty where it came otherwise."""


@dataclasses.dataclass(frozen=True)
class GateInfo:
    """Learned region gates as served."""

    bundle: GateBundle
    gates: Gates
    """Ready to run, on the CPU."""
    forced: bool
    """Trained on another model than the one served, and the operator insisted."""
    source: str = ""
    """What `--gate` said."""


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What an engine serves."""

    model: str
    model_hash: str
    components_hash: str
    """Of all that draws beside the U-Net's weights."""
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
    memory: MemoryNeed
    load_s: float
    """Seconds from nothing to an engine."""
    scheduler: str = ""
    """Class of the sampler."""
    timestep_spacing: str = ""
    """How it spaces timesteps, where it has a choice."""
    timesteps: tuple[int, ...] = ()
    """Of runs of as many steps, where they are set."""
    takes_timesteps: bool = False
    """Whether a run may choose its timesteps."""
    train_timesteps: int = 1000
    """Timesteps are from 0 to one less."""
    late_starts: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """First timestep of runs of so many steps, of those that start where a picture should be half done already."""
    previews: bool = True
    """Whether every step has an estimate of the clean picture."""
    loras: tuple[LoraInfo, ...] = ()
    """In the order in which they were fused."""
    embedded_guidance: float = 1.0
    """Guidance scale of a U-Net that takes it as an embedding; 1 where it takes none."""
    takes_guidance: bool = True
    """Whether a request may ask for guidance; a U-Net that takes it as an embedding has its own."""
    takes_pictures: bool = True
    """Whether a run may start from a picture or from latents of one; some schedulers do not say how to noise it."""
    latent_channels: int = 4
    vae_downscale: int = 8
    """Picture pixels for each cell of the latents, each way."""
    region_strides: tuple[int, ...] = ()
    """Pixels per cell, each way, of the grids on which the text is heard; empty where the backend takes no regions."""
    opens_attention: bool = True
    """Whether the backend runs attention layers as written: gates act in them, and attribution reads what is within."""
    made_for_guidance: bool = False
    """Whether the scheduler's settings are those of models of many steps with guidance. Nothing in a folder says it: a
    distilled model may have kept them."""
    other_points: tuple[HookPoint, ...] = ()
    """Where else in the U-Net an SAE could sit, in order of execution."""
    gate: GateInfo | None = None
    """None: no learned region gates are served."""
