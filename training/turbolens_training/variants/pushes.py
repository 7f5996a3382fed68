"""Steering by directions of one block, for SAEs that are compared: pushes of equal length, judged by the truth.

A push towards a value is the sum of the decoder rows of the features that are most more active where a thing has it,
each as long as its feature's mean activation. All pushes are then given the same length, in root mean square norms of
the block's update, so that no SAE is better for pushing harder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.sae.sae import Codes, Sae
from turbolens_training.activations.stream import LABELLING, Chunk, SceneStream
from turbolens_training.catalog.effects import contrasts
from turbolens_training.catalog.labels import GroundTruth, Observations
from turbolens_training.evaluation.interventions import shift
from turbolens_training.evaluation.sampling import sample, thumbnails
from turbolens_training.measures.concepts import Concept, Scenes, draw_scenes
from turbolens_training.measures.counterfactual import Sheet, interval
from turbolens_training.measures.ranking import Active

CHOICE_SHARE: Final = 4
"""Scenes of the measurement for each of the choice of a length."""
Pushes = Mapping[Concept, Tensor]
"""What is added to the update towards each value, [T or 1, d_model]."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Pictures that features are chosen on, and the scenes that they show."""

    chunks: list[Chunk]
    block: str
    grid: tuple[int, int]

    @classmethod
    def draw(cls, engine: Engine, block: str, pictures: int, *, seed: int, steps: int = 1, batch: int = 32) -> Choice:
        """Pictures whose captions name every value."""
        stream = SceneStream(
            engine, seed=seed, split=LABELLING, images=batch, complete=True, one_step_share=0.0, multi_steps=(steps,)
        )
        (point,) = (point for point in engine.info.hook_points if point.name == block)
        chunks = [stream.chunk(index) for index in range(-(-pictures // batch))]
        return cls(chunks, block, point.grid(*engine.info.default_size))

    def updates(self) -> Tensor:
        """The block's, [T, N, P, d_model]."""
        return torch.cat([chunk.updates.by_block[self.block] for chunk in self.chunks], 1)

    def rms(self) -> Tensor:
        """Root mean square norm of the update at each step, [T]."""
        return self.updates().square().sum(-1).mean((1, 2)).sqrt()

    def observe(self, codes: Codes) -> tuple[Active, GroundTruth]:
        """Codes [N, P, K] of these pictures with what the pictures show."""
        seen, start = Observations(), 0
        for chunk in self.chunks:
            rows = slice(start, start + len(chunk.codes))
            seen.add(chunk, {self.block: Codes(codes.values[rows], codes.indices[rows])})
            start = rows.stop
        return seen.active(self.block), seen.truth(self.grid)


def make_pushes(
    sae: Sae, choice: Choice, codes: Codes, concepts: Sequence[Concept], features: int
) -> dict[Concept, Tensor]:
    """A push towards each value, of length 1; nothing is added towards one that no feature tells of.

    Args:
        sae: whose rows they are made of.
        choice: what its features are chosen on.
        codes: of those pictures.
        concepts: the values.
        features: of each push, at most.
    """
    active, truth = choice.observe(codes)
    d_sae = sae.W_dec.shape[0]
    counts = torch.bincount(active.features, minlength=d_sae)
    means = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, active.features, active.values.double())
    means /= counts.clamp(min=1)
    rms = choice.rms()
    steps = range(len(rms) if sae.bundle.steps else 1)
    found = contrasts(active, truth, d_sae, concepts)
    pushes: dict[Concept, Tensor] = {}
    for concept in concepts:
        best = [j for j in found[concept].argsort(descending=True)[:features].tolist() if found[concept][j] > 0]
        rows = torch.stack([means[best].float() @ sae.directions(step)[best] for step in steps])
        length = (rows.square().sum(1) / rms.square()).mean().sqrt()
        pushes[concept] = rows / length if length > 0 else rows
    return pushes


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What pushes came to."""

    length: float
    nearest: float
    """Share of pictures nearest to the wanted value of all that the attribute has."""
    others: float
    """Share of the other attributes that are right."""
    change: float
    """Root mean square change of the picture, in grey values of -1 to 1."""
    count: int
    others_before: float
    """As `others`, of the pictures without a push."""

    def row(self) -> dict[str, object]:
        """Shares with Wilson's intervals at 95 %; per unit of change, the same by the change that was measured."""
        per = 1 / max(self.change, 1e-6)
        moved, right = interval(self.nearest, self.count), interval(self.others, self.count)
        return {
            "n": self.count,
            "length": self.length,
            "nearest": round(self.nearest, 3),
            "nearest_95": [round(end, 3) for end in moved],
            "others_right": round(self.others, 3),
            "others_95": [round(end, 3) for end in right],
            "change": round(self.change, 3),
            "nearest_per_change": round(per * self.nearest, 2),
            "nearest_per_change_95": [round(per * end, 2) for end in moved],
            "harm_per_change": round(per * (self.others_before - self.others), 3),
            "harm_per_change_95": [round(per * (self.others_before - end), 3) for end in reversed(right)],
        }


class Bench:
    """Scenes to steer, drawn once for all that is compared."""

    def __init__(
        self, engine: Engine, block: str, concepts: Sequence[Concept], scenes: int, steps: int, seed: int
    ) -> None:
        self._engine, self._block, self._steps, self._concepts = engine, block, steps, concepts
        size = engine.info.default_size[0] // engine.components.vae_downscale
        counts = {"choice": max(1, scenes // CHOICE_SHARE), "measure": scenes}
        self._scenes = {
            split: [draw_scenes(engine, concept, n, f"{seed}/pushes/{split}") for concept in concepts]
            for split, n in counts.items()
        }
        self._sheets = {split: [Sheet(some, size) for some in drawn] for split, drawn in self._scenes.items()}
        self._before = {split: self._draw(drawn, None, 0.0) for split, drawn in self._scenes.items()}
        self._right = {split: self._others(split, plain) for split, plain in self._before.items()}

    def best(self, pushes: Pushes, lengths: Sequence[float], window: tuple[int, int] | None = None) -> Pushed:
        """Pushes at the length that is best on scenes of their own; `window`: at these steps alone, half-open."""
        tried = {length: self._judge("choice", pushes, length, window) for length in lengths}
        length = max(tried, key=lambda one: tried[one].nearest * tried[one].others)
        return self._judge("measure", pushes, length, window)

    def _judge(self, split: str, pushes: Pushes, length: float, window: tuple[int, int] | None) -> Pushed:
        rows = []
        for concept in self._concepts:
            push = pushes[concept].expand(self._steps, -1)
            steps = torch.arange(self._steps)
            held = torch.ones(self._steps) if window is None else (steps >= window[0]) & (steps < window[1])
            rows.append(push * held[:, None])
        before, scenes = self._before[split], self._scenes[split]
        after = self._draw(scenes, rows, length)
        per = len(scenes[0].seeds)
        pairs = zip(self._concepts, self._sheets[split], after.split(per), strict=True)
        effects = [sheet.judge(concept, drawn) for concept, sheet, drawn in pairs]
        return Pushed(
            length,
            sum(effect.nearest for effect in effects) / len(effects),
            sum(effect.others for effect in effects) / len(effects),
            (after - before).square().mean().sqrt().item(),
            len(after),
            self._right[split],
        )

    def _others(self, split: str, pictures: Tensor) -> float:
        """Share of the other attributes that are right in pictures of a split."""
        sheets = self._sheets[split]
        parts = pictures.split(len(pictures) // len(sheets))
        judged = [s.judge(c, some).others for c, s, some in zip(self._concepts, sheets, parts, strict=True)]
        return sum(judged) / len(judged)

    @torch.inference_mode()
    def _draw(self, scenes: Sequence[Scenes], rows: Sequence[Tensor] | None, length: float) -> Tensor:
        """Pictures [all scenes, 3, h, w], those of each concept pushed by its rows [T, d_model]."""
        prompts = [prompt for some in scenes for prompt in some.prompts]
        seeds = [seed for some in scenes for seed in some.seeds]
        drawn = []
        for start in range(0, len(prompts), 32):
            part = slice(start, start + 32)
            intervene = None
            if rows is not None:
                owners = [at for at, some in enumerate(scenes) for _ in some.seeds][part]
                delta = torch.stack([rows[at] for at in owners], 1)[:, :, None]  # [T, N, 1, d_model]
                intervene = shift({self._block: length * delta})
            walked = sample(self._engine, prompts[part], seeds[part], self._steps, intervene=intervene)
            drawn.append(thumbnails(walked.latents))
        return torch.cat(drawn)
