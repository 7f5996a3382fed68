"""Settings of `turbolens train gates`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from turbolens_training.settings import Telling, counts_below_one, refuse

OF_THE_MACHINE: Final = (
    "out", "work", "overwrite", "resume", "device", "checkpoint_steps", "checkpoint_minutes", "scenes", "json",
)  # fmt: skip
"""Settings that change nothing of what is trained."""


@dataclasses.dataclass(frozen=True)
class GateConfig(Telling):
    """Train gates that say which tokens each position of a cross-attention hears, on a frozen model and scenes of two
    things (MaskAttn-SDXL, arXiv 2509.15357).

    The published recipe for SDXL (hidden 128, AdamW at 1e-4 with weight decay 0.01, 1,000 steps of warm-up and half a
    cosine, 16 pictures a step, 110,000 steps) scaled to the embedded model.
    """

    model: str = "mini"
    """Model to train on: `mini`, or a `diffusers` folder of its kind."""
    out: Path = Path("runs/gates/gates")
    """Folder of the gates. Those of an earlier run are never replaced, but by --overwrite or --resume."""
    overwrite: bool = False
    """Start anew: replace the gates of an earlier run in --out, and its checkpoint in --work."""
    resume: bool = False
    """Go on with the run in --work where there is one, and replace its own gates in --out."""
    work: Path = Path("runs/gates")
    """Folder of the checkpoint, from which a run goes on, and of the table of quality."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU when there is one."""
    seed: int = 0
    """Seed of the weights and of every batch."""
    blocks: tuple[str, ...] = ()
    """Blocks whose cross-attentions get gates, such as `up.0.1`; where none is named those of the published stage: the
    coarsest grid of both sides, without the middle. They share one head."""
    hidden: int = 64
    """Width of a head's networks; published: 128."""
    threshold: float = 0.5
    """A token is heard where its gate is above this."""
    closed: float = -1e4
    """What is added to the logits of a token that is not heard."""
    start_bias: float = 0.2
    """What the gates' logits start at: a little above 0, nearly all are open. In the authors' code 0: half."""
    steps: int = 150
    """Training steps."""
    batch: int = 4
    """Pictures of a step."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""
    warm_up: int = 10
    """Steps in which the rate rises from 0; then it falls by half a cosine."""
    one_step_share: float = 0.5
    """Share of a batch at timestep 999, on noise alone; the rest at those of runs of two to four steps."""
    checkpoint_steps: int = 50
    """Most steps between checkpoints; a run goes on from its last one."""
    checkpoint_minutes: float = 5.0
    """Most minutes between them."""
    held_out: int = 8
    """Held-out batches on which the loss is measured, with the gates and without."""
    scenes: int = 40
    """Held-out scenes that are drawn with the gates and without, to tell what they are worth."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        refuse(self.problems())

    def problems(self) -> Iterator[str]:
        """All that is wrong, in words."""
        yield from counts_below_one(self, "hidden", "steps", "batch", "checkpoint_steps", "held_out", "scenes")
        for name, least, most in (("threshold", 0.0, 1.0), ("one_step_share", 0.0, 1.0), ("weight_decay", 0.0, 1.0)):
            if not least <= getattr(self, name) <= most:  # not-a-number too
                yield f"{name}={getattr(self, name)}, expected {least:g} to {most:g}"
        if not -6e4 <= self.closed < 0:
            yield f"closed={self.closed}, expected below 0, at least -60000"
        if not abs(self.start_bias) <= 100:
            yield f"start_bias={self.start_bias}, expected -100 to 100"
        for name in ("learning_rate", "checkpoint_minutes"):
            if not getattr(self, name) > 0:
                yield f"{name}={getattr(self, name)}, expected above 0"
        if self.warm_up < 0:
            yield f"warm_up={self.warm_up}, expected at least 0"
        if self.overwrite and self.resume:
            yield "overwrite starts anew and resume goes on; choose one"

    @property
    def writes(self) -> tuple[Path, ...]:
        """Folders that the command writes to."""
        return (self.out, self.work)
