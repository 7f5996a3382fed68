"""What adding features does to pictures, by the ground truth of captioned scenes; a label says only what lifts them.

For each value of each attribute, and in each block, the features that are most more active where the value is are
candidates. In the block where the best of them, alone or a few together, move pictures best, a group is grown: the
candidate that moves most beside those that are in it already, until none helps. All by pictures of scenes of which no
table is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.catalog.labels import Effect
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.steering.edits import Edit, WeightedFeature
from turbolens_training.catalog.labels import GroundTruth
from turbolens_training.measures.concepts import Concept, draw_scenes, generate
from turbolens_training.measures.counterfactual import Effect as Found
from turbolens_training.measures.counterfactual import Sheet
from turbolens_training.measures.ranking import Active, pool

GROUP: Final = 4
"""Features of a group, at most."""
STRENGTH: Final = 4.0
"""At which each is added, in its mean activation."""
LEAST_MOVED: Final = 0.25
"""Share of pictures that a group must move to be told of."""
LEAST_OTHERS: Final = 0.75
"""Share of the other attributes that it must leave right: what breaks pictures moves them to nothing."""
_CANDIDATES: Final = 10
_ICON_STRENGTHS: Final = (4.0, 8.0, 16.0, 32.0)
_ICON_PIXELS: Final = 0.02
"""Share of the picture's pixels that an icon must change..."""
_ICON_CHANGE: Final = 32
"""...by so much, of 255, in a channel."""


def contrasts(active: Active, truth: GroundTruth, d_sae: int, concepts: Iterable[Concept]) -> dict[Concept, Tensor]:
    """How much more active each feature is where a value is than where the attribute has another: [d_sae] each."""
    wanted = {(concept.attribute, concept.value): concept for concept in concepts}
    found: dict[Concept, Tensor] = {}
    for into, count, candidates in truth.populations():
        mine = [c for c in candidates if (c.attribute, c.value) in wanted]
        if not mine:
            continue
        units = active if into is None else pool(active, into, count)
        for candidate in mine:
            on, off = (
                torch.zeros(d_sae, dtype=torch.float64).index_add_(
                    0, units.features, units.values.double() * among[units.units]
                ) / among.sum().clamp(min=1)
                for among in (candidate.positive, candidate.negative)
            )  # fmt: skip
            found[wanted[candidate.attribute, candidate.value]] = on - off
    return found


def measure_effects(
    engine: Engine, contrast: Mapping[str, Mapping[Concept, Tensor]], concepts: Sequence[Concept], *, scenes: int,
    batch: int, seed: int,
) -> dict[str, dict[int, list[Effect]]]:  # fmt: skip
    """The groups that move pictures, a feature's place in each as an effect.

    Args:
        engine: the model, with the SAEs.
        contrast: by SAE, what :func:`contrasts` found.
        concepts: towards which to move.
        scenes: pictures on which a group is judged.
        batch: pictures of a batch.
        seed: of the scenes.

    Returns:
        By SAE and feature.
    """
    found: dict[str, dict[int, list[Effect]]] = {name: {} for name in contrast}
    for concept in tqdm(concepts, desc="effects", unit="concept"):
        drawn = draw_scenes(engine, concept, scenes, f"{seed}/effects")
        sheet = Sheet(drawn, engine.info.default_size[0] // engine.components.vae_downscale)

        def judge(sae: str, group: list[int], concept: Concept = concept, sheet: Sheet = sheet) -> Found:
            edit = Edit("add", tuple(WeightedFeature(sae, index) for index in group), STRENGTH)
            return sheet.judge(concept, generate(engine, sheet.scenes, edit, batch))

        candidates = {name: _candidates(engine, name, by_concept[concept]) for name, by_concept in contrast.items()}
        tried = {
            name: max((judge(name, some[:few]) for few in (1, GROUP)), key=merit)
            for name, some in candidates.items()
            if some
        }
        if not tried:
            continue
        best = max(tried, key=lambda name: merit(tried[name]))
        group: list[int] = []
        steps: list[Found] = []
        while len(group) < min(GROUP, len(candidates[best])):
            effects = {index: judge(best, [*group, index]) for index in candidates[best] if index not in group}
            index = max(effects, key=lambda index: merit(effects[index]))
            if steps and merit(effects[index]) <= merit(steps[-1]):
                break
            group.append(index)
            steps.append(effects[index])
        if steps[-1].nearest < LEAST_MOVED or steps[-1].others < LEAST_OTHERS:
            continue
        for rank, (index, step) in enumerate(zip(group, steps, strict=True), 1):
            effect = Effect(
                concept.attribute, concept.value, round(step.nearest, 3), round(step.others, 3), STRENGTH, rank
            )
            found[best].setdefault(index, []).append(effect)
    for by_feature in found.values():
        for one in by_feature.values():
            one.sort(key=lambda effect: -effect.score)
    return found


def merit(effect: Found) -> float:
    """What a group is grown by: pictures moved, and how far the others went; what breaks much else counts little."""
    return (effect.nearest + (effect.margin + 1) / 4) * effect.others**2


def _candidates(engine: Engine, sae: str, contrast: Tensor) -> list[int]:
    stats = engine.info.saes[sae].bundle.stats
    if stats is None:
        return []
    best = contrast.argsort(descending=True, stable=True)[:_CANDIDATES].tolist()
    return [index for index in best if contrast[index] > 0 and stats.mean[index] > 0]


def measure_icons(engine: Engine, sae: str, batch: int) -> dict[int, float]:
    """The least strength, of those tried, at which a feature alone draws something in place of what its block writes.

    The base is the empty prompt, seed 0, in one step; without the block it is what strength 0 draws.
    """
    bundle = engine.info.saes[sae].bundle
    if bundle.stats is None:
        return {}
    left = [index for index in range(bundle.d_sae) if bundle.stats.mean[index] > 0]
    blank = None
    found: dict[int, float] = {}
    for strength in tqdm(_ICON_STRENGTHS, desc=f"icons, {sae}", unit="strength"):
        for start in range(0, len(left), batch):
            some = left[start : start + batch]
            wanted = [(index, strength) for index in some] + ([(some[0], 0.0)] if blank is None else [])
            jobs = [
                Job("", 0, 1, *engine.info.default_size, (Edit("replace", (WeightedFeature(sae, index),), amount),))
                for index, amount in wanted
            ]
            drawn = [r.picture.astype(np.int16) for r in engine.run(jobs) if r is not None and r.picture is not None]
            blank = drawn[-1] if blank is None else blank
            for index, picture in zip(some, drawn, strict=False):
                if (np.abs(picture - blank).max(-1) >= _ICON_CHANGE).mean() >= _ICON_PIXELS:
                    found[index] = strength
        left = [index for index in left if index not in found]
    return found
