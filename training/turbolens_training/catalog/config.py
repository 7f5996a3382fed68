"""Settings of `turbolens catalog build`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import tyro

from turbolens_training.settings import Telling, counts_below_one, refuse

LEAST_CROPS: Final = 3
"""Crops of a feature, at least, for a word to be read off them: the mean of fewer is ruled by one odd picture."""


@dataclasses.dataclass(frozen=True)
class BuildConfig(Telling):
    """Measure and name the features of bundles: statistics, top examples and what fires together, of the same pictures,
    and labels.

    Means that were published with an SAE stay, as strengths are told in them; others are measured anew.

    On the embedded model's captioned scenes every feature is named by what in a scene lifts it, from the ground truth;
    no judge, no guess. With --prompts any model's features get statistics and top examples, and keep their labels;
    with --encoder beside it, CLIP or another image-text encoder labels those that it finds a word for.

    Examples: `turbolens catalog build --saes runs/sae/bundles`; `turbolens catalog build --model
    stabilityai/sdxl-turbo --saes ./sdxl-saes --prompts captions.txt --examples 16
    --encoder openai/clip-vit-large-patch14`.
    """

    model: str = "mini"
    """Model the SAEs were trained on: `mini`, a `diffusers` folder, or a hub id."""
    variant: str | None = None
    """Variant of the model's weight files, such as `fp16`."""
    saes: Annotated[Path, tyro.conf.arg(aliases=["--sae"])] = Path("runs/sae/bundles")
    """A bundle, or a folder of bundles; their statistics, `features.parquet` and provenance are written."""
    force_sae: bool = False
    """Measure a bundle on a model that it was not trained on; its provenance then names that model's hash."""
    prompts: str | None = None
    """Prompts to draw pictures of, as for `turbolens train sae`: a text file (a prompt a line), or `FILE[:COLUMN]` of a
    Parquet, CSV or JSONL file or of a Hugging Face dataset; left out: captioned scenes, whose truth gives labels."""
    encoder: str | None = None
    """Image-text encoder, a `transformers` folder or hub id with safetensors: labels each feature with the word that
    its top examples, cropped around the place, fit more than other features' do."""
    words: Path | None = None
    """Text file of words or phrases to label with, one a line; left out: the most frequent ones of the prompts."""
    chance: float = 0.01
    """Share of features to which --encoder may give a label by chance: it sets how far a word must stand out."""
    work: Path = Path("runs/sae")
    """Folder of the table of what was labelled."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the held-out scenes, or of the prompts' pictures."""
    images: int = 3072
    """Pictures to look at, at most."""
    batch: int = 32
    """Pictures of a batch."""
    steps: tuple[int, ...] = (1, 2, 3, 4)
    """Sampling steps of the pictures that statistics are measured on: batches of prompts take them in turn, each batch
    of scenes one of them at random. One that stands twice is taken twice as often."""
    examples: int = 5
    """Top examples of each feature, each of another picture."""
    effect_scenes: int = 16
    """Scenes on which it is measured what adding features does to pictures, for each value of each attribute; 0: it is
    not. Prompts have no truth to measure by."""
    icons: bool = False
    """Find the strength at which each feature draws something by itself (`replace` on the empty prompt): up to four
    pictures of every feature."""
    co_firing_only: bool = False
    """Count which features fire together, on the same pictures, and leave all else of the catalog as it is: for bundles
    whose catalog was made before that was counted."""
    least_score: float = 0.6
    """Lowest selectivity that makes a label; a feature without one has an empty label."""
    least_z: float = 5.0
    """Lowest z of AUROC: of 40 candidates for each feature, chance takes none so far."""
    least_active: int = 20
    """Units of the candidate's split at which a feature must be active; fewer prove nothing."""

    def __post_init__(self) -> None:
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from counts_below_one(self, "images", "batch", "least_active")
        if self.effect_scenes < 0:
            yield f"effect_scenes={self.effect_scenes}, expected at least 0"
        if self.examples < 0:
            yield f"examples={self.examples}, expected at least 0"
        if not self.steps or min(self.steps) < 1:
            yield f"steps={self.steps}, expected whole numbers from 1"
        if self.encoder is not None and self.prompts is None:
            yield "encoder: needs prompts; scenes name features by their ground truth"
        if self.encoder is not None and self.examples < LEAST_CROPS:
            yield f"examples={self.examples}, expected at least {LEAST_CROPS} for an encoder to label by"
        if self.words is not None and self.encoder is None:
            yield "words: needs an encoder"
        if not 0 < self.chance < 1:
            yield f"chance={self.chance}, expected above 0 and below 1"

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.saes, self.work)
