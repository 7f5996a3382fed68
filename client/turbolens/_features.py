"""What is known of features."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from turbolens._edits import FeatureRef
from turbolens._table import Table, card
from turbolens_proto.v1 import feature_service_pb2

Nearness = Literal["decoder", "co-firing"]
"""What makes two features near: that they write alike, or that they fire together."""
NEARNESS: Final[dict[Nearness, feature_service_pb2.Nearness.ValueType]] = {
    "decoder": feature_service_pb2.NEARNESS_DECODER,
    "co-firing": feature_service_pb2.NEARNESS_CO_FIRING,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """One measured meaning of a feature."""

    attribute: str
    value: str
    region: str
    score: float
    """How well it fits, 0.5 being chance; `FeatureLabel.score` in `turbolens/v1/feature_service.proto` says what is
    measured."""


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """Where a picture lifts a feature: `lens.generate(e.prompt, seed=e.seed, steps=e.steps)` makes it again."""

    prompt: str
    seed: int
    steps: int
    """Steps that the picture was sampled in."""
    step: int
    """Step of the activation, from 0."""
    y: int
    """Row of the block's grid, from the top."""
    x: int
    """Column, from the left."""
    activation: float


@dataclasses.dataclass(frozen=True, slots=True)
class Effect:
    """What adding a feature does to pictures, together with those before it in a group that moves them to a value."""

    attribute: str
    value: str
    moved: float
    """Share of pictures of other values that are then nearest to this value, of all that the attribute has."""
    others_right: float
    """Share of the other attributes that are then still right."""
    strength: float
    """At which each was added, in its mean activation."""
    rank: int
    """Place in the group, from 1."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Feature:
    """What is known of one feature."""

    ref: FeatureRef
    label: str
    """In words; empty where nothing fits."""
    label_score: float
    """Score of the label, see :class:`Label`; 0.5 is chance, 0 stands for no label."""
    frequency: float
    """Share of positions where it is active."""
    mean: float
    """Mean activation where it is active: what strength 1 means."""
    max: float
    labels: tuple[Label, ...]
    examples: tuple[Example, ...] = ()
    """The pictures that lift it most, strongest first; from `get_feature` alone."""
    direction: npt.NDArray[np.float32] | None = dataclasses.field(default=None, compare=False)
    """Its decoder row, float32 [d_model]: what an activation of 1 writes; from `get_feature` alone."""
    effects: tuple[Effect, ...] = ()
    """What adding it does, the largest effect first; none where it moves nothing, or nobody measured."""
    icon_strength: float | None = None
    """`generate("", steer=[replace(feature, icon_strength)])` shows what it draws by itself; None: nothing that was
    seen."""

    @classmethod
    def from_proto(cls, message: feature_service_pb2.Feature) -> Feature:
        """From the server's message."""
        labels = tuple(Label(lb.attribute, lb.value, lb.region, lb.score) for lb in message.labels)
        examples = tuple(Example(e.prompt, e.seed, e.steps, e.step, e.y, e.x, e.activation) for e in message.examples)
        effects = tuple(
            Effect(e.attribute, e.value, e.moved, e.others_right, e.strength, e.rank) for e in message.effects
        )
        ref = FeatureRef(message.ref.sae, message.ref.index)
        direction = np.asarray(message.direction, np.float32) if message.direction else None
        known = (message.label, message.label_score, message.frequency, message.mean, message.max)
        icon = message.icon_strength if message.HasField("icon_strength") else None
        return cls(ref, *known, labels, examples, direction, effects, icon)

    def __repr__(self) -> str:
        known = f"{self.label!r} {self.label_score:.2f}" if self.label else "no label"
        return f"Feature({self.ref}, {known}, active {self.frequency:.2%}, mean {self.mean:.4g}, max {self.max:.4g})"

    def _repr_html_(self) -> str:
        rows = {
            "label": f"{self.label} ({self.label_score:.2f})" if self.label else "none",
            "active": f"{self.frequency:.2%} of positions",
            "mean where active": f"{self.mean:.4g}",
            "max": f"{self.max:.4g}",
        }
        tables = [Table(self.labels, ("attribute", "value", "region", "score"))] if self.labels else []
        tables += [Table(self.effects, ("attribute", "value", "rank", "moved", "others_right"))] if self.effects else []
        tables += [Table(self.examples, ("activation", "seed", "prompt"))] if self.examples else []
        return card(str(self.ref), rows, "".join(table._repr_html_() for table in tables))


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Match:
    """A feature found by words; goes straight into an edit."""

    feature: Feature
    score: float
    """How well it answers the words, 0 to 1; `FeatureMatch.score` in the same file says how it is made."""
    reason: str
    """By which label, and how."""

    @property
    def ref(self) -> FeatureRef:
        """The feature."""
        return self.feature.ref

    def __repr__(self) -> str:
        return f"Match({self.ref}, {self.feature.label!r}, score {self.score:.3f}, {self.reason})"


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """A feature near to another; goes straight into an edit."""

    feature: Feature
    cosine: float
    """Of the two decoder directions, -1 to 1."""
    jaccard: float | None = None
    """Positions where both are active as a share of those where either is; None where that was not asked for."""

    @classmethod
    def from_proto(cls, message: feature_service_pb2.NearFeature) -> Near:
        """From the server's message."""
        jaccard = message.jaccard if message.HasField("jaccard") else None
        return cls(Feature.from_proto(message.feature), message.cosine, jaccard)

    @property
    def ref(self) -> FeatureRef:
        """The feature."""
        return self.feature.ref
