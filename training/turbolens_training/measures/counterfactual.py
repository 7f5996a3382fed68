"""The counterfactual test: beside which renderings of their scenes do steered pictures lie?"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from turbolens_training.measures.concepts import Concept, Scenes
from turbolens_training.mini.evaluate import score_attributes
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import jitter_from_noise


@dataclasses.dataclass(frozen=True)
class Effect:
    """What became of scenes that were to show a value that is not their own."""

    count: int
    """Of them."""
    moved: float
    """Share of pictures nearer to the wanted value than to their own: a test of two."""
    nearest: float
    """Share of pictures nearest to the wanted value, of all that the attribute has."""
    margin: float
    """Mean of (error to own - error to wanted) / distance between the two: -1 is the own picture, 1 the wanted."""
    others: float
    """Share of the other attributes that are still right, mean over attributes."""

    @property
    def score(self) -> float:
        """Moved, beside all other values, and nothing broken."""
        return self.nearest * self.others


class Sheet:
    """Scenes of one thing, each with every attribute at every value, rendered once for many pictures of them."""

    def __init__(self, scenes: Scenes, size: int) -> None:
        self.scenes = scenes
        jitter = jitter_from_noise(scenes.noise)
        drawn: dict[str, list[Tensor]] = {}
        self._columns: dict[str, int] = {}
        for concept in Concept.all():
            codes = scenes.codes.clone()
            codes[:, concept.column] = concept.code
            drawn.setdefault(concept.attribute, []).append(render(codes, jitter, size)[0])
            self._columns[concept.attribute] = concept.column
        self._drawn = {attribute: torch.stack(values, 1) for attribute, values in drawn.items()}  # [N, values, 3, h, w]

    def nearest(self, pictures: Tensor) -> dict[str, Tensor]:
        """By attribute, the value that each picture [N, 3, h, w] of the scenes is nearest to, [N]."""
        return {name: self._errors(name, pictures).argmin(1) for name in self._drawn}

    def _errors(self, attribute: str, pictures: Tensor) -> Tensor:
        return (self._drawn[attribute] - pictures[:, None]).square().mean((2, 3, 4))

    def judge(self, concept: Concept, pictures: Tensor) -> Effect:
        """How far pictures [N, 3, h, w] of the scenes moved to a concept; those whose own value it is are left out."""
        codes, noise = self.scenes.codes, self.scenes.noise
        some = codes[:, concept.column] != concept.code
        if not some.any():
            return Effect(0, 0.0, 0.0, -1.0, 1.0)
        errors, rows = self._errors(concept.attribute, pictures), torch.arange(len(codes))
        own = codes[:, self._columns[concept.attribute]]
        drawn = self._drawn[concept.attribute]
        apart = (drawn[rows, own] - drawn[:, concept.code]).square().mean((1, 2, 3))
        gain = errors[rows, own] - errors[:, concept.code]
        moved = gain > 0
        # The other attributes are judged beside whichever of the two values the picture shows.
        shown = codes.clone()
        shown[moved, concept.column] = concept.code
        scores = score_attributes(shown[some], noise[some], pictures[some])
        others = [score.right for name, score in scores.items() if name != concept.attribute and score.count]
        return Effect(
            int(some.sum()),
            moved[some].float().mean().item(),
            (errors.argmin(1) == concept.code)[some].float().mean().item(),
            (gain / apart.clamp(min=1e-6))[some].mean().item(),
            sum(others) / len(others),
        )


def interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share of so many, at 95 %."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
