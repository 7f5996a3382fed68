"""An edit turned into numbers, once: its features' places in a dictionary, their amounts, its mask on the grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from turbolens_server.steering.edits import Condition, Edit, Rule, Unit, WeightedFeature
from turbolens_server.steering.kinds import KINDS, EditKind


@dataclasses.dataclass(frozen=True)
class ResolvedCondition:
    """A condition as numbers."""

    feature: int
    rule: Rule
    threshold: float  # in activations

    def share(self, z: Tensor) -> Tensor:
        """How much of an edit acts at activations [P]: in [0, 1]."""
        if self.rule == "map":
            return (z.float() / self.threshold).clamp(0, 1)
        return (z > self.threshold if self.rule == "above" else z < self.threshold).float()


@dataclasses.dataclass(frozen=True)
class ResolvedEdit:
    """One edit at one hook point and step, with units, weights and mask turned into numbers."""

    kind: EditKind
    features: Tensor  # [F] int64, distinct; empty for a kind that names hook points
    amounts: Tensor  # [F] float32: what is added, set, swapped in or taken over per feature; the factor of `scale`
    mask: Tensor  # [P] float32 in [0, 1]
    reference: str | None = None
    """The run whose activations, or whose update, it reads; None: none."""
    condition: ResolvedCondition | None = None
    """What its mask is multiplied by, known in the pass alone; None: nothing."""


def resolve(
    edit: Edit, mask: Tensor, first_of: Mapping[str, int], unit_of: Callable[[WeightedFeature, Unit], float]
) -> ResolvedEdit:
    """Resolve an edit at one hook point and step.

    Args:
        edit: any edit that acts there.
        mask: of the edit on the hook point's grid, [P] float32.
        first_of: where the features of each SAE begin in the hook point's dictionary; features of others are left out.
        unit_of: what amount 1 means for a feature, in activations, for the units that statistics give.
    """
    kind = KINDS[edit.kind]
    here = [feature for feature in edit.features if feature.sae in first_of]
    measured = kind.unit and edit.unit in (Unit.MEAN, Unit.NORM)
    amounts = [edit.amount * (unit_of(f, edit.unit) if measured else 1.0) * f.weight for f in here]
    return ResolvedEdit(
        kind=edit.kind,
        features=torch.tensor([first_of[feature.sae] + feature.index for feature in here], dtype=torch.int64),
        amounts=torch.tensor(amounts, dtype=torch.float32),
        mask=mask,
        reference=edit.reference,
        condition=None if edit.condition is None else _condition(edit.condition, first_of, unit_of),
    )


def _condition(
    condition: Condition, first_of: Mapping[str, int], unit_of: Callable[[WeightedFeature, Unit], float]
) -> ResolvedCondition:
    feature = condition.feature
    one = unit_of(feature, condition.unit) if condition.unit is Unit.MEAN else 1.0
    return ResolvedCondition(first_of[feature.sae] + feature.index, condition.rule, condition.threshold * one)
