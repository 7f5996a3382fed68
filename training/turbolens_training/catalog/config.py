"""Settings of `turbolens train labels`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class LabelsConfig:
    """Name features by what in a scene lifts them, from the ground truth of held-out pictures; no judge, no guess."""

    model: str = "mini"
    """Model the SAEs were trained on: `mini`, or a `diffusers` folder."""
    saes: Path = Path("runs/sae/bundles")
    """Folder of the bundles; their `features.parquet` is written."""
    work: Path = Path("runs/sae")
    """Folder of the table of what was labelled."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the held-out scenes."""
    images: int = 3072
    """One-step pictures to look at."""
    batch: int = 32
    """Pictures of a batch."""
    least_score: float = 0.6
    """Lowest selectivity that makes a label; a feature without one has an empty label."""
    least_z: float = 5.0
    """Lowest z of AUROC: of 40 candidates for each feature, chance takes none so far."""
    least_active: int = 20
    """Units of the candidate's split at which a feature must be active; fewer prove nothing."""
