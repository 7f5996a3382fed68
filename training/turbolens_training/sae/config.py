"""Settings of `turbolens train sae`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, get_args

from turbolens_training.activations.config import SCENES, DataConfig
from turbolens_training.settings import counts_below_one, refuse

ArchitectureName = Literal["topk", "batch-topk", "jumprelu", "matryoshka", "temporal"]
LevelWeights = Literal["uniform", "reverse"]
Prediction = Literal["last", "ridge", "nothing"]
Selection = Literal["topk", "batch-topk"]
ARCHITECTURES: Final[tuple[ArchitectureName, ...]] = get_args(ArchitectureName)
OF_EXPORT: Final = ("gates", "allow_below_gates", "overwrite", "resume")
"""Settings that decide whether a result is exported, not what it is."""
OF_THE_MACHINE: Final = (
    "model", "variant", "prompts", "cache", "shards", "out", "work", "device", "backend",
    "checkpoint_steps", "checkpoint_minutes", "board", "json",
)  # fmt: skip
"""Settings that say where things are, and change nothing of what comes out."""
OF_ARCHITECTURE: Final = {
    "bandwidth": "jumprelu",
    "l0_coefficient": "jumprelu",
    "level_weights": "matryoshka",
    "nested_k": "matryoshka",
    "prefixes": "matryoshka",
    "prediction": "temporal",
    "run_steps": "temporal",
    "selection": "temporal",
}
"""Settings that only one architecture has."""

_FROM_ONE: Final = (
    "d_sae", "k", "steps", "batch", "steps_per_chunk", "tokens_per_image", "dead_tokens", "held_out_chunks",
    "checkpoint_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gates:
    """Thresholds of the export; what is below one is refused with the reason."""

    explained_variance: float = 0.8
    """Least explained variance on held-out data, all timesteps together."""
    dead: float = 0.05
    """Largest share of dead features."""
    l0: float = 1.5
    """Largest mean number of active features on held-out data, in multiples of the `k` that was aimed at: a learnt
    threshold can settle far above it."""
    norm_tolerance: float = 1e-3
    """Largest distance of a decoder row's norm from 1."""

    def __post_init__(self) -> None:
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        for name, most in (("explained_variance", 1.0), ("dead", 1.0), ("l0", math.inf), ("norm_tolerance", math.inf)):
            if not 0 <= getattr(self, name) <= most:  # not-a-number too
                yield f"gates.{name}={getattr(self, name)}, expected 0 to {most:g}"


@dataclasses.dataclass(frozen=True)
class SaeConfig(DataConfig):
    """Train an SAE with AuxK (Gao et al., arXiv 2406.04093) on the update of every hook point, all in one run.

    The published recipe for SDXL Turbo (Surkov et al., arXiv 2410.22366: d_sae 5120 on 1280 dimensions, k 10, batch
    4096, dead after 10 M tokens) scaled to the embedded model's 128 dimensions.

    `--config FILE.yaml` reads settings from a file, by the names below with `_` or `-`, those of a group as a mapping
    under its name (`gates: {dead: 0.1}`), switches as `true` or `false`; flags come on top.
    """

    shards: Path | None = None
    """Train on the shards of this one cache alone, and make no pictures."""
    out: Path = Path("runs/sae/bundles")
    """Folder of the bundles: one for each hook point, by its name. Those of an earlier run are never replaced, but by
    --overwrite or --resume."""
    overwrite: bool = False
    """Start anew: replace the bundles of an earlier run in --out, and its checkpoint in --work."""
    resume: bool = False
    """Go on with the run in --work where there is one, and replace its own bundles in --out: for jobs that are started
    again and again."""
    work: Path = Path("runs/sae")
    """Folder of the checkpoint, from which a run goes on, and of the table of quality."""
    architecture: ArchitectureName = "topk"
    """How features are selected. `topk`: k at each position; `batch-topk`: k on average over a batch, served as a
    JumpReLU; `jumprelu`: a learnt threshold for each feature; `matryoshka`: a TopK whose k and width can be chosen
    when it is served; `temporal`: k for all steps of a run together, of what changed since the step before."""
    d_sae: int = 256
    """Features of each SAE."""
    k: int = 10
    """Features active at a position: at most, on average (`batch-topk`), or aimed at (`jumprelu`); of a `temporal`, for
    all steps of a run together."""
    nested_k: tuple[int, ...] = (4, 16)
    """Other k that a `matryoshka` is trained at; every k up to the largest can be served."""
    prefixes: tuple[int, ...] | None = None
    """Numbers of first features that are an SAE of their own in a `matryoshka`, besides all; left out: a quarter and a
    half of `d_sae`, where they are no smaller than the largest k."""
    level_weights: LevelWeights = "uniform"
    """Weight of a `matryoshka`'s levels in its loss. `uniform`: all alike; `reverse`: n, n - 1, ... 1 from the smallest
    k to the largest, and from the smallest prefix to the whole (arXiv 2502.20578)."""
    run_steps: int = 4
    """Denoising steps of all pictures of a `temporal`, which is served at this number alone; a token is then a
    position's updates at all of them."""
    prediction: Prediction = "last"
    """What a `temporal` takes from each step before its features see it: `last`, the step before; `ridge`, what a ridge
    regression expects of the step before (arXiv 2605.27813); `nothing`: the steps are side by side as they are."""
    selection: Selection = "topk"
    """How a `temporal` selects. `topk`: k at each position; `batch-topk`: k on average over a batch, as published, and
    where it is served what is above a fixed threshold, so that no run depends on its batch mates."""
    bandwidth: float = 0.5
    """Width of the kernel by which a `jumprelu` estimates the gradient of its thresholds, on normalised updates."""
    l0_coefficient: float = 1.0
    """Weight of a `jumprelu`'s penalty (L0 / k - 1)^2."""
    steps: int = 3000
    """Training steps."""
    batch: int = 2048
    """Tokens of a step, for each block."""
    learning_rate: float = 3e-3
    """Peak rate of Adam. The usual law, 2e-4 / sqrt(d_sae / 2^14), gives 1.6e-3, too slow for 3,000 steps."""
    warm_up: int = 100
    """Steps in which the rate rises from 0."""
    decay_share: float = 0.5
    """Share of the steps at the end in which the rate falls to 0."""
    auxk_coefficient: float = 1 / 8
    """Weight of the loss by which dead features learn; published: 1 / 32, which leaves some of `mini`'s dead."""
    auxk_share: float = 0.5
    """Share of the k places of a position, the weakest, that dead features learn to fill: rounded, but at least one
    place. 0: they learn what all k leave over, d_model / 2 of them at a position, as published."""
    dead_tokens: int = 200_000
    """Tokens in a row on which a dead feature was not active."""
    steps_per_chunk: int = 8
    """Training steps for each chunk: 1 is slowest and never repeats a token."""
    tokens_per_image: int = 64
    """Positions kept of each picture and step."""
    reservoir: int = 65_536
    """Tokens in each block's shuffling reservoir; the first filling also sets mean and scale."""
    checkpoint_steps: int = 500
    """Most steps between checkpoints; a run goes on from its last one."""
    checkpoint_minutes: float = 5.0
    """Most minutes between them."""
    board: Literal["tensorboard", "wandb"] | None = None
    """Show the run's log on TensorBoard (event files in --work/board) or Weights & Biases too, by their own libraries,
    which `pip install tensorboard` or `pip install wandb` brings."""
    half: bool = False
    """Write the bundles' weights as float16, half as large; quality is measured on what is written."""
    gates: Gates = dataclasses.field(default_factory=Gates)
    """What an SAE must reach to be exported."""
    allow_below_gates: bool = False
    """Export SAEs that fail a gate too; their provenance says which."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, and settings that would do nothing."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from super().problems()
        yield from counts_below_one(self, *_FROM_ONE)
        if self.shards is not None and (self.cache is not None or self.prompts != SCENES):
            yield "shards is all the data of a run; leave out cache and prompts"
        if not self.checkpoint_minutes > 0:
            yield f"checkpoint_minutes={self.checkpoint_minutes}, expected above 0"
        if self.overwrite and self.resume:
            yield "overwrite starts anew and resume goes on; choose one"
        if self.k > self.d_sae:
            yield f"k={self.k}, expected 1 to d_sae={self.d_sae}"
        if not 0 <= self.auxk_share <= 1:
            yield f"auxk_share={self.auxk_share}, expected 0 to 1"
        if self.reservoir < self.batch:
            yield f"reservoir={self.reservoir}, expected at least batch={self.batch}"
        for field in dataclasses.fields(self):
            architecture = OF_ARCHITECTURE.get(field.name, self.architecture)
            if architecture != self.architecture and getattr(self, field.name) != field.default:
                yield f"{field.name} is a setting of architecture {architecture}, and this is {self.architecture}"
        if self.architecture == "temporal":
            if self.run_steps < 2:
                yield f"run_steps={self.run_steps}, expected at least 2; at one step nothing changes"
            for name in ("one_step_share", "multi_steps"):
                if getattr(self, name) != getattr(DataConfig, name):
                    yield f"{name} does nothing for a temporal, whose pictures all take run_steps"
        if self.architecture == "matryoshka":
            k_max = self.k_max
            if not all(1 <= k <= self.d_sae for k in self.nested_k):
                yield f"nested_k={self.nested_k}, expected each 1 to d_sae={self.d_sae}"
            sizes = [*self.matryoshka_prefixes, self.d_sae]
            if sizes != sorted({*sizes}) or sizes[0] < k_max:
                yield (
                    f"prefixes={self.prefixes}, expected rising sizes from the largest k, {k_max}, to below "
                    f"d_sae={self.d_sae}"
                )

    @property
    def k_max(self) -> int:
        """Largest k that a `matryoshka` is trained at."""
        return max((self.k, *self.nested_k))

    @property
    def matryoshka_prefixes(self) -> tuple[int, ...]:
        """Sizes of the prefixes, without the whole."""
        if self.prefixes is not None:
            return self.prefixes
        return tuple(size for size in (self.d_sae // 4, self.d_sae // 2) if size >= self.k_max)

    @property
    def auxk_places(self) -> int:
        """Places of a position that dead features learn to fill; 0 only where the published AuxK is asked for."""
        return 0 if self.auxk_share == 0 else max(1, round(self.auxk_share * self.k))

    @property
    def step_mix(self) -> tuple[float, tuple[int, ...]]:
        return (0.0, (self.run_steps,)) if self.architecture == "temporal" else super().step_mix

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay."""
        decay = max(1, round(self.decay_share * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warm_up), (self.steps - step) / decay)

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out, self.work) if self.cache is None else (self.out, self.work, self.cache)
