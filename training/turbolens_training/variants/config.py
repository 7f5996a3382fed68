"""Settings of `turbolens train nested` and `temporal`; the docstrings are the commands' help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from turbolens_training.activations.config import DataConfig
from turbolens_training.sae.config import SaeConfig
from turbolens_training.settings import Telling, counts_below_one, refuse


@dataclasses.dataclass(frozen=True)
class VariantsConfig(Telling):
    """What two reports have in common: SAEs of one block are trained on the same pictures, and measured."""

    model: str = DataConfig.model
    """Model that draws captioned scenes: `mini`, or a `diffusers` folder of its kind."""
    block: str = "up.0.0"
    """Hook point."""
    work: Path = Path("runs/variants")
    """Folder of the SAEs, which are not trained again, and of the cache of their pictures."""
    out: Path = Path("docs")
    """Folder that the tables and pictures are written below."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of everything."""
    steps: int = 600
    """Training steps of each SAE."""
    batch: int = 1024
    """Tokens of a training step."""
    pictures: int = 192
    """Held-out pictures of the reconstruction."""
    choice_pictures: int = 256
    """Others, on which features are chosen."""
    scenes: int = 4
    """Scenes that are steered towards each value, and for four of them one more to choose the length of a push on."""
    lengths: tuple[float, ...] = (1.0, 2.0)
    """Lengths of a push that are tried, in root mean square norms of the block's update."""
    features: int = 1
    """Features of a push, at most: one steers better than four of this choice."""

    def __post_init__(self) -> None:
        refuse(counts_below_one(self, "steps", "batch", "pictures", "choice_pictures", "scenes", "features"))

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.work, self.out)

    def training(self, name: str, **settings: Any) -> SaeConfig:
        """The settings of one of the SAEs, by its folder's name."""
        return SaeConfig(
            model=self.model, hook_points=(self.block,), cache=self.work / "cache", seed=self.seed, device=self.device,
            steps=self.steps, batch=self.batch, reservoir=16 * self.batch, held_out_chunks=8,
            out=self.work / name / "bundles", work=self.work / name, overwrite=True, allow_below_gates=True,
            **settings,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NestedConfig(VariantsConfig):
    """Read nested SAEs at several k and prefixes, beside a TopK trained for each: what is explained, what steers, and
    which attributes the first features tell of."""


@dataclasses.dataclass(frozen=True)
class TemporalConfig(VariantsConfig):
    """Compare SAEs of whole runs of four steps, by what each takes from a step, with SAEs of single steps: what is
    explained at equal L0, what steers at equal length; and draw the path of features over the steps."""

    pictures: int = 96
    choice_pictures: int = 128
    sae: str = "mini-temporal"
    """Temporal SAE whose features' paths are drawn: a bundle, a folder of one, or the name of one that ships."""
