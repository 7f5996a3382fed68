"""What an edit is: as a request says it, before it is turned into numbers."""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal

from turbolens_server.steering.choice import FeatureChoice
from turbolens_server.steering.kinds import KINDS, EditKind
from turbolens_server.steering.masks import Mask


class Unit(enum.Enum):
    """What amount 1 means for a feature."""

    RAW = "raw"
    """The activation itself."""
    MEAN = "mean"
    """The feature's mean activation where it is active, from the bundle's statistics."""
    NORM = "norm"
    """The RMS norm of the block's update at that step, from the bundle's statistics."""
    REFERENCE = "reference"
    """The feature's activation in the edit's reference run, at the same position and step."""


@dataclasses.dataclass(frozen=True, slots=True)
class WeightedFeature:
    """A feature of an SAE with its share in an edit."""

    sae: str
    index: int
    weight: float = 1.0


Rule = Literal["above", "below", "map"]
Side = Literal["cond", "contrast", "both"]
"""Predictions of a guided run: the one with the prompt; that one, and the one without by the opposite; both alike."""


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """Where an edit acts, by a feature's activation there before any edit of the block and step."""

    feature: WeightedFeature
    rule: Rule
    threshold: float
    """Above or below which it acts, or from which it acts in full; in the unit."""
    unit: Unit = Unit.MEAN


@dataclasses.dataclass(frozen=True, slots=True)
class Edit:
    """One validated edit; see `proto/turbolens/v1/steering.proto` for what each kind does."""

    kind: EditKind
    features: tuple[WeightedFeature, ...]
    """None for a kind that names hook points."""
    amount: float = 1.0
    """Strength, factor, value or multiplier, as the kind has it."""
    unit: Unit = Unit.MEAN
    """Ignored by a kind without units."""
    mask: Mask | None = None
    """None: everywhere."""
    steps: tuple[int, int] | None = None
    """Half-open range of 0-based steps; None: every step."""
    reference: str | None = None
    """The run of the job that it reads; None: none."""
    points: tuple[str, ...] = ()
    """Hook points of a kind that names them."""
    condition: Condition | None = None
    """Multiplies the mask; of a feature at the one hook point where the edit acts. None: none."""
    choice: FeatureChoice | None = None
    """Of a `transfer` without features: how the engine chooses them. None: it does not."""
    side: Side = "cond"
    """Which predictions of a guided run it moves."""

    def opposite(self) -> Edit:
        """The edit that moves activations as far the other way.

        Raises:
            ValueError: its kind has none.
        """
        mirrored = KINDS[self.kind].opposite
        if mirrored is None:
            raise ValueError(f"{self.kind} has no opposite")
        return dataclasses.replace(self, amount=mirrored(self.amount))

    def acts_at(self, step: int) -> bool:
        """Whether it acts at a step."""
        return self.steps is None or self.steps[0] <= step < self.steps[1]
