"""Settings of the data and of `turbolens train cache`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import tyro

from turbolens_training.settings import Telling, counts_below_one, refuse

SCENES: Final = "scenes"
"""Instead of a file of prompts: captions of random scenes, by the grammar of the embedded model."""


def prompt_set(prompts: str) -> str:
    """What tables call a set of prompts: no word of where it lies."""
    return "captioned scenes" if prompts == SCENES else Path(prompts).name


@dataclasses.dataclass(frozen=True)
class DataConfig(Telling):
    """What pictures to make and where to read their updates."""

    model: str = "mini"
    """Model to train on: `mini`, or a `diffusers` folder."""
    variant: str | None = None
    """Variant of the model's weight files, such as `fp16`: that which is served."""
    hook_points: tuple[str, ...] = ()
    """Where to read: blocks like `up.0.1`, or attention layers within one like `up.0.1.attn2.0`; the published four
    where none is named."""
    prompts: str = SCENES
    """What to draw pictures of: `scenes` (the grammar of the embedded model), a text file (a prompt a line), or
    `FILE[:COLUMN]` of a Parquet, CSV or JSONL file or of a Hugging Face dataset (a folder, or an id as owner/name)."""
    cache: Path | None = None
    """Folder that keeps the updates as float16, for the next run on the same pictures; none by default."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    backend: Literal["auto", "torch", "torch-compile"] = "auto"
    """What runs the U-Net. `auto`: `torch` on a CPU, `torch-compile` on a GPU; `torch-compile` on a CPU is native code,
    compiled once in minutes and kept, and draws pictures in less time."""
    images: int = 32
    """Pictures of a chunk of the stream."""
    one_step_share: float = 0.7
    """Share of pictures sampled in one step; the rest cover the later timesteps."""
    multi_steps: tuple[int, ...] = (2, 3, 4)
    """Numbers of steps that the rest is sampled in."""
    held_out_chunks: int = 40
    """Chunks of the held-out data, on which quality and feature statistics are measured."""

    def __post_init__(self) -> None:
        """Refuse what no picture can be made by."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from counts_below_one(self, "images", "multi_steps")
        if not 0 <= self.one_step_share <= 1:
            yield f"one_step_share={self.one_step_share}, expected 0 to 1"
        if self.one_step_share < 1 and not self.multi_steps:
            yield f"multi_steps: none, expected one or more where one_step_share={self.one_step_share} < 1"

    @property
    def step_mix(self) -> tuple[float, tuple[int, ...]]:
        """Share of chunks sampled in one step, and the numbers of steps of the rest."""
        return self.one_step_share, self.multi_steps

    @property
    def most_steps(self) -> int:
        """Most steps of a picture of the run."""
        one_step_share, multi_steps = self.step_mix
        return max((1,) if one_step_share == 1 else multi_steps)


@dataclasses.dataclass(frozen=True)
class FillCacheConfig(DataConfig):
    """Make the pictures of a run beforehand, and keep their updates; what the cache has already is not made again."""

    cache: Path = Path("runs/cache")
    """Folder that keeps the updates as float16."""
    chunks: int = 100
    """Chunks of the training data."""
    workers: int = 0
    """Ray workers that share the work, each with a model of its own; 0: this process does it."""

    def __post_init__(self) -> None:
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from super().problems()
        yield from counts_below_one(self, "chunks", "held_out_chunks")

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.cache,)


@dataclasses.dataclass(frozen=True)
class VerifyCacheConfig(Telling):
    """Read every byte of a cache and compare it with its checksums."""

    path: tyro.conf.Positional[Path]
    """A cache, or a folder of caches."""

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return ()


@dataclasses.dataclass(frozen=True)
class ImportTarsConfig(Telling):
    """Turn the tars that the authors of arXiv 2410.22366 collect, one for each block, into a cache to train on."""

    path: tyro.conf.Positional[Path]
    """Folder of the tars."""
    cache: Path = Path("runs/cache")
    """Folder that the cache is made in."""

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.cache,)
