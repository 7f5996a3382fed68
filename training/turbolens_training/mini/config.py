"""Settings of `turbolens train mini`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from turbolens_training.settings import Telling

OF_THE_MACHINE: Final = ("out", "device", "precision", "compile", "checkpoint_minutes", "ship", "report", "json")
"""Settings that say where and how fast a run goes, not what comes out but for rounding."""


@dataclasses.dataclass(frozen=True)
class MiniConfig(Telling):
    """Train the embedded model from nothing: text encoders, VAE, U-Net, decoder polish; then write its folder."""

    out: Path = Path("runs/mini")
    """Folder of checkpoints, log, progress picture and the finished model."""
    seed: int = 0
    """Seed of weights and of every batch: the data of step n depends on (seed, stage, n) alone."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    precision: str = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 where this processor multiplies bf16 faster than fp32."""
    compile: bool = False
    """Compile the U-Net's training step (two minutes at first; needs a C++ compiler on a CPU)."""
    text_steps: int = 750
    """Steps in which the text encoders learn to name a scene's attributes."""
    text_batch: int = 128
    """Captions in such a step."""
    vae_steps: int = 1200
    """Steps of 16 quarter pictures for the VAE."""
    half_steps: int = 1800
    """U-Net steps at half the latent resolution, where a step costs a third and what is learnt carries over."""
    full_steps: int = 1000
    """U-Net steps at the full latent resolution."""
    polish_steps: int = 400
    """Steps of 8 pictures in which the decoder learns to draw from the U-Net's own latents too."""
    batch: int = 64
    """Pictures in a U-Net step."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW on the U-Net's vectors; Muon's on its matrices is `muon_rate`."""
    muon_rate: float = 0.02
    """Peak rate of Muon on the U-Net's inner matrices."""
    full_rate: float = 0.5
    """Factor on both rates at the full resolution, where the peak that serves the half one makes the loss jump."""
    one_step_share: float = 0.68
    """Share of a batch trained at t=999 on pure coupled noise; the rest at the sampler's other timesteps."""
    block_dropout: float = 0.5
    """Share of pictures whose update at a transformer block that is no hook point is left out in training, so that
    the hook points learn to do without it."""
    foreground_weight: float = 6.0
    """Extra weight of the cells that things cover, in the U-Net's loss."""
    checkpoint_minutes: float = 4.0
    """Minutes between checkpoints, each with a quick evaluation and a picture of the progress."""
    ship: bool = False
    """Put the finished model in place of the one that the server ships."""
    report: bool = False
    """Do not train: measure the shipped model on 1,000 held-out scenes and write docs/mini."""

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out,)
