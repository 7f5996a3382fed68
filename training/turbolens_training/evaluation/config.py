"""Settings of `turbolens train dose`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class DoseConfig:
    """Steer held-out scenes by every concept at several strengths, and measure what moves and what stays."""

    model: str = "mini"
    """Model to steer: `mini`, or a `diffusers` folder."""
    saes: Path = Path("runs/sae/bundles")
    """Folder of the labelled bundles."""
    out: Path = Path("runs/dose")
    """Folder of the tables and pictures."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the scenes."""
    concepts: tuple[str, ...] = ()
    """Each `attribute=value`; empty: every value of every attribute."""
    scenes: int = 32
    """Scenes for each concept's curve."""
    choice_scenes: int = 12
    """Other scenes, on which the features are chosen."""
    choice_strength: float = 8.0
    """Strength at which they are chosen."""
    singles: int = 3
    """Features of each block that are tried alone, best labels first."""
    strengths: tuple[float, ...] = (-8.0, -4.0, 0.0, 4.0, 8.0, 16.0)
    """Strengths of the curve, in each feature's mean activation."""
    batch: int = 32
    """Pictures of a batch."""
