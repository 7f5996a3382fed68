"""What single features tell: the best feature for every attribute value, and how far labels can be relied on.

Every number is taken on pictures that took no part in choosing: labels come from pictures of their own, and probes
choose on one half of these pictures and are scored on the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.catalog.labels import read_labels
from turbolens_server.engine.engine import Engine
from turbolens_training.activations.stream import HELD_OUT, SceneStream
from turbolens_training.catalog.labels import Candidate, GroundTruth, Observations
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.sampling import saes_by_block
from turbolens_training.measures.ranking import Active, Ranking, pool


@dataclasses.dataclass(frozen=True)
class Split:
    """One attribute value among the units that can have it, with the ranking of all features over those units."""

    candidate: Candidate
    ranking: Ranking
    chosen_on: Tensor  # [units] bool: the half that features are chosen on


def splits(active: Active, truth: GroundTruth, d_sae: int) -> Iterator[Split]:
    """Every split of every population of things, backgrounds and pictures; single cells are left out."""
    pictures = len(truth.codes)
    for into, count, candidates in truth.populations():
        if into is None:
            continue
        ranking = Ranking(pool(active, into, count), d_sae)
        even = (torch.arange(count) * pictures // count) % 2 == 0  # by picture: both things of one lie in one half
        for candidate in candidates:
            yield Split(candidate, ranking, even)


def best_probe(split: Split) -> tuple[int, float]:
    """The feature with the best AUROC on the half of the choice, and its AUROC on the other half."""
    positive, negative = split.candidate.positive, split.candidate.negative
    chosen = split.ranking.compare(positive & split.chosen_on, negative & split.chosen_on).auroc
    scored = split.ranking.compare(positive & ~split.chosen_on, negative & ~split.chosen_on).auroc
    feature = int(chosen.argmax())
    return feature, float(scored[feature])


def firing(split: Split) -> tuple[Tensor, Tensor]:
    """Sensitivity and specificity of every feature as a detector of the value: it says yes where it is active.

    Returns:
        Each [d_sae]: share of the units with the value where it is active, share of those without where it is not.
    """
    positive, negative = split.candidate.positive, split.candidate.negative
    sensitivity = split.ranking.active_units(positive) / positive.sum().clamp(min=1)
    return sensitivity, 1 - split.ranking.active_units(negative) / negative.sum().clamp(min=1)


def observe(engine: Engine, config: EvalConfig) -> Observations:
    """Encode held-out one-step pictures whose captions name every value."""
    stream = SceneStream(engine, seed=config.seed, split=HELD_OUT, images=config.batch, complete=True)
    seen, saes = Observations(), saes_by_block(engine)
    for index in tqdm(range(-(-config.probe_pictures // config.batch)), desc="probes", unit="chunk"):
        chunk = stream.chunk(index)
        seen.add(chunk, {block: sae.encode(chunk.updates.by_block[block][0]) for block, sae in saes.items()})
    return seen


def measure_probes(engine: Engine, config: EvalConfig) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Probe every block.

    Returns:
        A row for each block and value: the best single feature and its AUROC. And a row for each labelled feature:
        sensitivity and specificity for its own label, and the same for the value's other labels of that attribute on
        average, which is what a label pinned on at random would get.
    """
    seen = observe(engine, config)
    points = {point.name: point for point in engine.info.hook_points}
    probes: list[dict[str, object]] = []
    detectors: list[dict[str, object]] = []
    for block, sae in saes_by_block(engine).items():
        d_sae = sae.W_dec.shape[0]
        truth = seen.truth(points[block].grid(*engine.info.default_size))
        found: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}
        for split in splits(seen.active(block), truth, d_sae):
            candidate = split.candidate
            feature, auroc = best_probe(split)
            name = (candidate.attribute, candidate.value, candidate.region)
            probes.append(
                {
                    "block": block,
                    "attribute": candidate.attribute,
                    "value": candidate.value,
                    "region": candidate.region,
                    "feature": feature,
                    "auroc": round(auroc, 4),
                }
            )
            found[name] = firing(split)
        for index, labels in read_labels(sae.bundle.folder, d_sae).items():
            if not labels.label or not labels.labels:  # words that others chose name no attribute to test
                continue
            first = labels.labels[0]
            own = (first.attribute, first.value, first.region)
            if own in found:
                detectors.append(detector_row(block, index, own, found))
    return probes, detectors


def detector_row(
    block: str, index: int, own: tuple[str, str, str], found: Mapping[tuple[str, str, str], tuple[Tensor, Tensor]]
) -> dict[str, object]:
    """How one feature does as a detector of its label, beside the other values of the attribute in that region."""
    others = [key for key in found if (key[0], key[2]) == (own[0], own[2]) and key != own]

    def balanced(key: tuple[str, str, str]) -> float:
        return float(found[key][0][index] + found[key][1][index]) / 2

    return {
        "block": block,
        "feature": index,
        "label": f"{own[0]}={own[1]}",
        "sensitivity": round(float(found[own][0][index]), 4),
        "specificity": round(float(found[own][1][index]), 4),
        "balanced_accuracy": round(balanced(own), 4),
        "other_values": round(sum(map(balanced, others)) / len(others), 4),
    }
