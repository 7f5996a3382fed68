"""Dose and response: does steering by a concept's features move that attribute, more with strength, and it alone?

The judge is the counterfactual test: the scene rendered with the wanted value and with its own, same jitter; a
picture has moved when it is nearer to the first. Everything is chosen by measurement: candidates by their labels,
among them the best on scenes of their own, and then the curve on scenes that took no part in the choice.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.catalog.labels import read_labels
from turbolens_server.catalog.search import commonness
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import SaeInfo
from turbolens_server.engine.types import Job
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.edits import Edit, WeightedFeature
from turbolens_training.evaluation.config import DoseConfig
from turbolens_training.evaluation.plots import contact_strip, plot_curves
from turbolens_training.measures.concepts import Concept, Scenes, draw_scenes, generate, pick_concepts
from turbolens_training.measures.report import write_table
from turbolens_training.mini.evaluate import score_attributes
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import (
    jitter_from_noise,
)

GROUP: Final = 5
"""Features of a group."""
_POOL: Final = 4096
"""Random scenes among which those fit for a concept are found."""


@dataclasses.dataclass(frozen=True)
class Steering:
    """Features to add together; the weights keep a group's push about as long as that of one feature."""

    block: str
    features: tuple[int, ...]

    def edit(self, strength: float) -> Edit:
        weight = len(self.features) ** -0.5  # decoder rows of different features are nearly orthogonal
        features = tuple(WeightedFeature(self.block, index, weight) for index in self.features)
        return Edit("add", features, strength)


@dataclasses.dataclass(frozen=True)
class Effect:
    """What became of the scenes."""

    moved: float
    """Share of pictures nearer to the wanted value than to their own."""
    margin: float
    """Mean of (error to own - error to wanted) / distance between the two: -1 is the own picture, 1 the wanted."""
    others: float
    """Share of the other attributes that are still right, mean over attributes."""

    @property
    def score(self) -> float:
        """Moved, and nothing broken."""
        return self.moved * self.others


def judge(scenes: Scenes, concept: Concept, pictures: Tensor) -> Effect:
    """The counterfactual test of steered pictures [N, 3, h, w]."""
    jitter, size = jitter_from_noise(scenes.noise), pictures.shape[-1]
    wanted_codes = scenes.codes.clone()
    wanted_codes[:, concept.column] = concept.code
    own, wanted = (render(codes, jitter, size)[0] for codes in (scenes.codes, wanted_codes))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))

    gain = distance(pictures, own) - distance(pictures, wanted)
    moved = gain > 0
    margin = gain / distance(own, wanted).clamp(min=1e-6)
    # The other attributes are judged beside whichever of the two values the picture shows.
    shown = torch.where(moved[:, None], wanted_codes, scenes.codes)
    scores = score_attributes(shown, scenes.noise, pictures)
    others = [score.right for name, score in scores.items() if name != concept.attribute and score.count]
    return Effect(moved.float().mean().item(), margin.mean().item(), sum(others) / len(others))


def read_labelled(info: SaeInfo, folder: Path) -> list[dict[str, Any]]:
    """The label rows of an SAE's features, each with its `sureness`, in [0, 1): how common it is."""
    if info.bundle.measured is None:
        raise ValueError(f"{info.name} has no measured statistics; turbolens catalog build makes them")
    common = commonness(info.bundle.measured.frequency)
    known = read_labels(folder, info.bundle.d_sae)
    return [{**dataclasses.asdict(row), "sureness": float(common[index])} for index, row in known.items()]


def labelled_features(rows: list[dict[str, Any]], concept: Concept, n: int) -> list[int]:
    """The features labelled with this concept, by score times sureness, best first."""
    best: dict[int, float] = {}
    for row in rows:
        for label in row["labels"]:
            if (label["attribute"], label["value"]) == (concept.attribute, concept.value):
                best[row["index"]] = max(label["score"] * row["sureness"], best.get(row["index"], 0.0))
    return sorted(best, key=lambda index: -best[index])[:n]


def candidates(labels: dict[str, list[dict[str, Any]]], concept: Concept, singles: int) -> list[Steering]:
    """What is tried for a concept: in each block the best-labelled features alone, and the best few together."""
    found = []
    for block, rows in labels.items():
        best = labelled_features(rows, concept, max(singles, GROUP))
        found += [Steering(block, (index,)) for index in best[:singles]]
        if len(best) > 1:
            found.append(Steering(block, tuple(best[:GROUP])))
    return found


def _row(concept: Concept, steering: Steering, strength: float, effect: Effect) -> dict[str, object]:
    return {
        "attribute": concept.attribute,
        "value": concept.value,
        "block": steering.block,
        "features": " ".join(map(str, steering.features)),
        "strength": strength,
        "moved": round(effect.moved, 3),
        "margin": round(effect.margin, 3),
        "others_right": round(effect.others, 3),
    }


def choose(
    engine: Engine, labels: dict[str, list[dict[str, Any]]], concept: Concept, config: DoseConfig
) -> list[tuple[Steering, Effect]]:
    """Every candidate with its effect on the scenes of the choice, best first.

    Where none moves a picture all the way at that strength, the one that comes closest is best.
    """
    scenes = draw_scenes(engine, concept, config.choice_scenes, f"{config.seed}/choice")
    tried = []
    for steering in candidates(labels, concept, config.singles):
        drawn = generate(engine, scenes, steering.edit(config.choice_strength), config.batch)
        tried.append((steering, judge(scenes, concept, drawn)))
    return sorted(tried, key=lambda pair: (-pair[1].score, -pair[1].margin))


def block_table(trials: list[tuple[Concept, Steering, Effect]]) -> list[dict[str, object]]:
    """Which block carries which attribute: each block's best effect on a value, mean over the attribute's values."""
    best: dict[str, dict[str, dict[str, float]]] = {}
    for concept, steering, effect in trials:
        values = best.setdefault(concept.attribute, {}).setdefault(steering.block, {})
        values[concept.value] = max(effect.score, values.get(concept.value, 0.0))
    rows: list[dict[str, object]] = []
    for attribute, blocks in best.items():
        tried = {value for values in blocks.values() for value in values}  # a block without a candidate moves nothing
        means = {block: round(sum(values.values()) / len(tried), 3) for block, values in blocks.items()}
        rows.append({"attribute": attribute, **means, "best": max(means, key=lambda block: means[block])})
    return rows


def measure_dose(config: DoseConfig) -> None:
    """Choose features for every concept, draw the dose-response curves, write tables and pictures."""
    sources = [str(config.saes)]
    engine = load_engine(
        model=config.model, device=config.device, variant=config.variant, saes=sources, force_sae=config.force_sae
    )
    labels = {name: read_labelled(info, config.saes / info.hook_point) for name, info in engine.info.saes.items()}
    concepts = pick_concepts(config.concepts)
    trials, curves, chosen = [], [], []
    for concept in tqdm(concepts, desc="dose", unit="concept"):
        tried = choose(engine, labels, concept, config)
        trials += [(concept, steering, effect) for steering, effect in tried]
        single = next((s for s, _ in tried if len(s.features) == 1), None)
        group = next((s for s, _ in tried if len(s.features) > 1), None)
        scenes = draw_scenes(engine, concept, config.scenes, f"{config.seed}/curve")
        for steering in filter(None, (single, group)):
            effects = {}
            for strength in config.strengths:
                drawn = generate(engine, scenes, steering.edit(strength), config.batch)
                effects[strength] = judge(scenes, concept, drawn)
                curves.append(_row(concept, steering, strength, effects[strength]))
            chosen.append((max(effect.score for effect in effects.values()), concept, steering))
    write_table(config.out / "dose", curves)
    write_table(config.out / "blocks", block_table(trials))
    plot_curves(config.out / "dose.png", curves)
    if chosen:
        best: dict[str, tuple[float, Concept, Steering]] = {}
        for entry in chosen:
            attribute = entry[1].attribute
            if attribute not in best or entry[0] > best[attribute][0]:
                best[attribute] = entry
        strips = []
        height, width = engine.info.default_size
        for _, concept, steering in best.values():
            scene = draw_scenes(engine, concept, 1, f"{config.seed}/curve")
            jobs = [
                Job(scene.prompts[0], scene.seeds[0], 1, height, width, (steering.edit(strength),))
                for strength in config.strengths
            ]
            pictures = [result.picture for result in engine.run(jobs) if result and result.picture is not None]
            name = "+".join(map(str, steering.features))
            strips.append((f"{concept}\n{steering.block}/{name}", scene.prompts[0], pictures))
        contact_strip(config.out / "strips.png", strips, config.strengths)
