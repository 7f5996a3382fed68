"""SceneEdit: pairs of captions that differ in one value, on the same noise, so that the exact edited picture is known.

A picture is judged beside two renderings with the same jitter: s of the scene as it was, t of the scene as it should
become. Its *progress* is how far it went along the line between them, <p - s, t - s> / |t - s|^2: 0 at s, 1 at t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_training.evaluation.edits import CaptionPairs
from turbolens_training.measures.concepts import Concept, Scenes, draw_scenes
from turbolens_training.measures.counterfactual import Sheet, interval
from turbolens_training.mini.captions import plain_caption
from turbolens_training.mini.evaluate import psnr
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import decode_scenes, jitter_from_noise


@dataclasses.dataclass(frozen=True)
class Group:
    """The pairs of one concept: scenes of another value of its attribute, and the same scenes with that value."""

    concept: Concept
    scenes: Scenes

    @property
    def target(self) -> Tensor:
        """The edited scenes, [N, CODE_DIM]."""
        codes = self.scenes.codes.clone()
        codes[:, self.concept.column] = self.concept.code
        return codes

    def exact(self, size: int) -> tuple[Tensor, Tensor]:
        """The exact pictures before and after the edit, each [N, 3, size, size]."""
        jitter = jitter_from_noise(self.scenes.noise)
        return render(self.scenes.codes, jitter, size)[0], render(self.target, jitter, size)[0]


@dataclasses.dataclass(frozen=True)
class EditScore:
    """What became of some pairs, each a mean over them."""

    progress: float
    """0: the picture as it was; 1: the edited one."""
    nearer: float
    """Share of pictures nearer to the edited one."""
    psnr: float
    """To the exact edited picture, dB."""
    others: float
    """Share of the other attributes that are right."""
    pairs: int = 1
    """Of them."""
    counts_as: float = 1.0
    """Pairs that would make as sure of a mean of means that count the same: fewer, where these are of unequal many."""

    @classmethod
    def mean(cls, scores: Sequence[EditScore]) -> EditScore:
        """Mean of scores, each counting the same."""
        rows = [(score.progress, score.nearer, score.psnr, score.others) for score in scores]
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        counts_as = len(scores) ** 2 / sum(1 / score.counts_as for score in scores)
        progress, nearer, psnr, others = means
        return cls(progress, nearer, psnr, others, sum(score.pairs for score in scores), counts_as)

    def interval(self, share: float) -> tuple[float, float]:
        """At 95 %, of one of its shares (Wilson's); wider than need be for `others`, of several attributes a pair."""
        return interval(share, self.counts_as)


def draw_pairs(engine: Engine, concepts: Sequence[Concept], per_concept: int, key: str) -> list[Group]:
    """Pairs for each concept; `key` names the draw."""
    return [Group(concept, draw_scenes(engine, concept, per_concept, key)) for concept in concepts]


def caption_pairs(groups: Sequence[Group]) -> CaptionPairs:
    """The plain captions of all pairs, group after group: the two of a pair differ in one value and nothing else."""
    captions = [plain_caption(scene) for group in groups for scene in decode_scenes(group.scenes.codes)]
    edited = [plain_caption(scene) for group in groups for scene in decode_scenes(group.target)]
    return CaptionPairs(captions, edited, [seed for group in groups for seed in group.scenes.seeds])


def split(groups: Sequence[Group], pictures: Tensor) -> Iterator[tuple[Group, Tensor]]:
    """Each group with its part of what was made of `caption_pairs`."""
    yield from zip(groups, pictures.split([len(group.scenes.seeds) for group in groups]), strict=True)


def score_group(group: Group, pictures: Tensor, sheet: Sheet) -> EditScore:
    """Score the edited pictures [N, 3, h, w] of one group beside its renderings."""
    effect, n = sheet.judge(group.concept, pictures), len(pictures)
    target = group.exact(pictures.shape[-1])[1]
    return EditScore(
        (1 + effect.margin) / 2, effect.moved, psnr(pictures, target).mean().item(), effect.others, n, float(n)
    )


def score_edits(
    groups: Sequence[Group], pictures: Tensor, sheets: Sequence[Sheet] | None = None
) -> dict[str, EditScore]:
    """Scores by attribute, each a mean over its values, and under `all` the mean over attributes.

    `sheets` are the groups' renderings, for who scores many pictures of them; None: they are drawn here.
    """
    drawn = sheets or [Sheet(group.scenes, pictures.shape[-1]) for group in groups]
    by_attribute: dict[str, list[EditScore]] = {}
    for (group, some), sheet in zip(split(groups, pictures), drawn, strict=True):
        by_attribute.setdefault(group.concept.attribute, []).append(score_group(group, some, sheet))
    scores = {attribute: EditScore.mean(found) for attribute, found in by_attribute.items()}
    return {**scores, "all": EditScore.mean(list(scores.values()))}
