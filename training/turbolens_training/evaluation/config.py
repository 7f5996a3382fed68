"""Settings of `turbolens train dose`, `eval`, `regions`, `riebench`, `words`; the docstrings are the commands' help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from turbolens_training.activations.config import SCENES
from turbolens_training.settings import Telling, counts_below_one, refuse


@dataclasses.dataclass(frozen=True)
class DoseConfig(Telling):
    """Steer held-out scenes by every concept at several strengths, and measure what moves and what stays."""

    model: str = "mini"
    """Model to steer: `mini`, or a `diffusers` folder."""
    variant: str | None = None
    """Variant of the model's weight files, such as `fp16`."""
    saes: Annotated[Path, tyro.conf.arg(aliases=["--sae"])] = Path("runs/sae/bundles")
    """Folder of the labelled bundles."""
    force_sae: bool = False
    """Steer with SAEs that were trained on another model."""
    out: Path = Path("runs/dose")
    """Folder of the tables and pictures."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the scenes."""
    concepts: tuple[str, ...] = ()
    """Each `attribute=value`; empty: every value of every attribute."""
    scenes: int = 48
    """Scenes for each concept's curve."""
    choice_scenes: int = 12
    """Other scenes, on which the features and their strength are chosen."""
    singles: int = 1
    """Features of each block that are tried alone, best labels first."""
    strengths: tuple[float, ...] = (-8.0, 0.0, 4.0, 8.0, 16.0)
    """Strengths of the curve, in each feature's mean activation; one of those above 0 is chosen."""
    batch: int = 32
    """Pictures of a batch."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be measured with."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from counts_below_one(self, "scenes", "choice_scenes", "batch")
        if 0 not in self.strengths or max(self.strengths) <= 0:
            yield f"strengths={self.strengths}, expected 0, to compare with, and at least one above it"

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out,)


@dataclasses.dataclass(frozen=True)
class EvalConfig(Telling):
    """Measure the SAEs of a model that draws captioned scenes against the truth, and write one folder of results.

    The folder holds every table as JSON and Markdown, every figure as PNG, and report.html with all of it in one file.
    """

    model: str = "mini"
    """Model that the SAEs belong to: `mini`, or a `diffusers` folder of its kind."""
    variant: str | None = None
    """Variant of the model's weight files, such as `fp16`."""
    saes: Annotated[Path, tyro.conf.arg(aliases=["--sae"])] = Path("runs/sae/bundles")
    """Folder of the bundles, one for each hook point."""
    force_sae: bool = False
    """Take SAEs that were trained on another model; the report names them and the model by their hashes."""
    prompts: str = SCENES
    """Prompts of `quality`, as for `turbolens train sae`: those held out of training by the same seed. By others than
    `scenes`, the grammar of the embedded model, `quality` and `stability` alone can be measured: there is no truth."""
    seeds: tuple[Path, ...] = ()
    """Folders of bundles trained alike from other seeds, for `stability`."""
    out: Path = Path("runs/eval")
    """Folder of the results."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of every scene and every random choice."""
    parts: tuple[str, ...] = ("quality", "stability", "splice", "probes", "blocks", "edits", "locality")
    """What to measure; see docs/evaluation.md."""
    concepts: tuple[str, ...] = ()
    """What `blocks` and `edits` edit towards, each `attribute=value`; empty: every value of every attribute."""
    steps: int = 1
    """Denoising steps of `splice`, `blocks` and `edits`; `probes` and `locality` take one, `quality` one to four."""
    batch: int = 32
    """Pictures of a batch."""
    quality_pictures: int = 256
    """Held-out pictures of `quality`, half of them in one step, the rest in two to four."""
    splice_scenes: int = 64
    """Held-out scenes of `splice`."""
    probe_pictures: int = 768
    """Held-out pictures of `probes`: one half to choose features on, the other to score them."""
    pairs: int = 3
    """Pairs of captions for each value of each attribute, in `blocks` and `edits`."""
    choice_pairs: int = 3
    """Other pairs for each value, from which `edits` takes its mean differences."""
    features: tuple[int, ...] = (4, 16, 64)
    """Numbers of features that `edits` transfers, and as many removed, pooled over all blocks."""
    multipliers: tuple[float, ...] = (1.0, 2.0)
    """Factors on what is transferred."""
    mean_multipliers: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    """Factors on the mean differences: larger, as a mean over positions is smaller than the change where it matters."""
    strengths: tuple[float, ...] = (4.0, 8.0, 16.0)
    """Strengths of adding one labelled feature, and of every edit of the features known for a value, in their means."""
    known_features: int = 4
    """Features of a value that `edits` adds, sets and swaps, where the catalog has no measured group for it."""
    locality_features: int = 8
    """Random features of each block, that its statistics saw active, for `locality` to add to half of the picture."""
    locality_scenes: int = 8
    """Scenes that it adds each of them to."""
    locality_strength: float = 0.5
    """How much it adds, as a share of the update's usual norm, so that blocks compare."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be measured with."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from counts_below_one(
            self, "steps", "batch", "quality_pictures", "splice_scenes", "probe_pictures", "pairs", "choice_pairs",
            "features", "known_features", "locality_features", "locality_scenes",
        )  # fmt: skip
        if not self.parts:
            yield "parts: none"

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out,)


@dataclasses.dataclass(frozen=True)
class RegionsConfig(Telling):
    """Draw scenes of two things with phrases under masks, through learned gates and without, and measure whether each
    came out as said, and in what time."""

    model: str = "mini"
    """Model: `mini`, or a `diffusers` folder of its kind."""
    gate: str | None = None
    """Draw through these learned region gates too: a folder, or `mini`, its own."""
    force_gate: bool = False
    """Take gates that were trained on another model."""
    methods: tuple[str, ...] = ()
    """Only these ways, by the names of the table, such as `prompt` and `prompt, gates`; left out: all."""
    out: Path = Path("runs/regions")
    """Folder of the table and the picture."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the scenes."""
    scenes: int = 240
    """Scenes, each drawn in every way."""
    batch: int = 8
    """Pictures of a batch."""
    examples: int = 4
    """Scenes that are shown."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be measured with."""
        refuse(counts_below_one(self, "scenes", "batch", "examples"))

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordsConfig(Telling):
    """Ask of features at the z of a cross-attention which word made them fire, and whether it is the right one, on
    scenes whose truth is known.

    One half of the scenes says what each feature stands for; the other is asked. Features of one attribute alone count:
    at least 0.9 of their activation is in scenes with one value, and below 0.8 in those with any of another attribute.
    """

    model: str = "mini"
    """Model: `mini`, or a `diffusers` folder of its kind."""
    saes: Annotated[Path, tyro.conf.arg(aliases=["--sae"])] = Path("runs/sae/bundles")
    """Folder of SAEs; those at the z of a cross-attention are asked."""
    out: Path = Path("runs/words")
    """Folder of the table."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the scenes."""
    scenes: int = 240
    """Scenes of each half, of one thing each."""
    cases: int = 200
    """Features in scenes that have their value, at most, of each SAE."""
    batch: int = 8
    """Pictures of a batch."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be measured with."""
        refuse(counts_below_one(self, "scenes", "cases", "batch"))

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RieBenchConfig(Telling):
    """Edit pictures by transferring features between the runs of two prompts, by the protocol of RIEBench.

    The items are read from a file that you give; nothing is shipped or downloaded.
    """

    items: Path
    """JSON list of items, each with `id`, `editing_type_id` (1 to 9), `original_prompt` and `editing_prompt`."""
    model: str = "stabilityai/sdxl-turbo"
    """Model: a hub id, a `diffusers` folder, or `mini`."""
    variant: str | None = None
    """Variant of the model's weight files, such as `fp16`."""
    saes: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--sae"])] = ()
    """SAEs, one for each hook point to edit: bundles, folders of bundles, or published reference folders."""
    force_sae: bool = False
    """Take SAEs that were trained on another model; the report names them and the model by their hashes."""
    masks: Path | None = None
    """Folder of grey PNGs, ID_original.png and ID_edited.png, where to take from and where to put; left out: the whole
    picture."""
    out: Path = Path("runs/riebench")
    """Folder of the results."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    dtype: str = "auto"
    """`float32`, `float16`, `bfloat16`, or `auto`: float16 on a GPU. The published runs used float32."""
    seed: int = 42
    """Seed of every picture."""
    steps: int = 4
    """Denoising steps."""
    batch: int = 4
    """Pairs of a batch."""
    limit: int | None = None
    """Only so many items of each edit type; left out: all."""
    features: tuple[int, ...] = (80, 160, 320, 640)
    """Numbers of features that are transferred, and as many removed, pooled over all blocks."""
    multipliers: tuple[float, ...] = (1.0, 2.0)
    """Factors on what is transferred."""
    dense_multipliers: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Factors on the dense difference of the updates, the baseline."""
    examples: int = 9
    """Items whose pictures are shown."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be edited with."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from counts_below_one(self, "steps", "batch", "features", "limit", "examples")

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out,)
