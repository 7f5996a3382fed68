"""Settings of `turbolens train sae`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from turbolens_training.export.config import Gates

OF_EXPORT: Final = ("gates", "allow_below_gates")
"""Settings that decide whether a result is exported, not what it is."""


@dataclasses.dataclass(frozen=True)
class SaeConfig:
    """Train a TopK SAE with AuxK (Gao et al., arXiv 2406.04093) on the update of every hook point, all in one run.

    The published recipe for SDXL Turbo (Surkov et al., arXiv 2410.22366: d_sae 5120 on 1280 dimensions, k 10, batch
    4096, dead after 10 M tokens) scaled to the embedded model's 128 dimensions.
    """

    model: str = "mini"
    """Model to train on: `mini`, or a `diffusers` folder."""
    out: Path = Path("runs/sae/bundles")
    """Folder of the bundles: one for each hook point, by its name."""
    work: Path = Path("runs/sae")
    """Folder of the checkpoint, from which a run goes on, and of the table of quality."""
    seed: int = 0
    """Seed of weights, data and batches."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    d_sae: int = 1024
    """Features of each SAE."""
    k: int = 10
    """Features active at a position, at most."""
    steps: int = 3000
    """Training steps."""
    batch: int = 2048
    """Tokens of a step, for each block."""
    learning_rate: float = 3e-3
    """Peak rate of Adam. The usual law, 2e-4 / sqrt(d_sae / 2^14), gives 8e-4, too slow for 3,000 steps."""
    warm_up: int = 100
    """Steps in which the rate rises from 0."""
    decay_share: float = 0.2
    """Share of the steps at the end in which the rate falls to 0."""
    auxk_coefficient: float = 1 / 32
    """Weight of the loss in which dead features learn from the residual."""
    dead_tokens: int = 200_000
    """A feature is dead once it was not active on so many tokens in a row."""
    images: int = 32
    """Pictures of a chunk of the stream."""
    steps_per_chunk: int = 8
    """Training steps for each chunk: 1 is slowest and never repeats a token."""
    tokens_per_image: int = 64
    """Positions kept of each picture and step."""
    reservoir: int = 65_536
    """Tokens in each block's shuffling reservoir; the first filling also sets mean and scale."""
    one_step_share: float = 0.7
    """Share of pictures sampled in one step; the rest cover the later timesteps."""
    multi_steps: tuple[int, ...] = (2, 3, 4)
    """Numbers of steps that the rest is sampled in."""
    held_out_chunks: int = 40
    """Chunks of the held-out data, on which quality and feature statistics are measured."""
    checkpoint_steps: int = 500
    """Steps between checkpoints; a run goes on from its last one."""
    gates: Gates = dataclasses.field(default_factory=Gates)
    """What an SAE must reach to be exported."""
    allow_below_gates: bool = False
    """Export SAEs that fail a gate too; their provenance says which."""

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay."""
        decay = max(1, round(self.decay_share * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warm_up), (self.steps - step) / decay)
