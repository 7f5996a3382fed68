"""Ways of steering that need no second run: edits of the features that the catalog knows for a value."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turbolens_server.sae.sae import Sae
from turbolens_server.steering.edits import Edit, WeightedFeature
from turbolens_training.evaluation.dose import grown_group, labelled_features
from turbolens_training.evaluation.edits import Material, Method, Steered
from turbolens_training.evaluation.pairs import Group
from turbolens_training.measures.concepts import Concept

Features = tuple[WeightedFeature, ...]
Edits = Callable[[Concept, Concept], tuple[Edit, ...]]
"""What moves a picture of one value to another: (own, wanted)."""


def known_features(
    saes: Mapping[str, Sae], labels: Mapping[str, Sequence[Mapping[str, Any]]], concept: Concept, n: int
) -> Features:
    """The group that the catalog measured to move pictures to a value; where it did not, the n features of one block
    that are labelled best with it. None where there is neither."""
    ways: list[tuple[float, str, tuple[int, ...]]] = []
    for block, given in labels.items():
        rows = [dict(row) for row in given]
        if group := grown_group(rows, concept):
            (whole,) = {
                e["moved"] * e["others_right"]
                for row in rows
                for e in row.get("effects", ())
                if (e["attribute"], e["value"], e["rank"]) == (concept.attribute, concept.value, len(group))
            }
            ways.append((2 + whole, block, group))  # before labels, which tell and do not move
        elif found := labelled_features(rows, concept, n):
            ways.append((max(_fit(row, concept) for row in rows), block, tuple(found)))
    if not ways:
        return ()
    _, block, indices = max(ways)
    return tuple(WeightedFeature(saes[block].bundle.name, index) for index in indices)


def _fit(row: Mapping[str, Any], concept: Concept) -> float:
    scores = [
        lb["score"] for lb in row["labels"] if (lb["attribute"], lb["value"]) == (concept.attribute, concept.value)
    ]
    return float(max(scores, default=0.0) * row["sureness"])


def random_features(saes: Mapping[str, Sae], like: Features, key: str) -> Features:
    """As many others of the same SAE that its statistics saw active."""
    if not like:
        return ()
    stats = next(sae.bundle.stats for sae in saes.values() if sae.bundle.name == like[0].sae)
    if stats is None:
        raise ValueError(f"{like[0].sae} has no statistics")
    named = {feature.index for feature in like}
    active = [j for j, mean in enumerate(stats.mean.tolist()) if mean > 0 and j not in named]
    drawn = random.Random(key).sample(active, min(len(like), len(active)))
    return tuple(WeightedFeature(like[0].sae, index) for index in drawn)


def by_concept(groups: Sequence[Group], edits: Edits) -> Method:
    """A method that edits each picture by its own value and the wanted one."""
    everything = {(concept.attribute, concept.code): concept for concept in Concept.all()}
    of_pair = [
        (everything[group.concept.attribute, int(code)], group.concept)
        for group in groups
        for code in group.scenes.codes[:, group.concept.column]
    ]
    made = {pair: edits(*pair) for pair in dict.fromkeys(of_pair)}

    def method(m: Material) -> Steered:
        return Steered(tuple(made[pair] for pair in of_pair[m.rows]))

    return method


def named_methods(
    saes: Mapping[str, Sae], labels: Mapping[str, Any], groups: Sequence[Group], n: int, strengths: Sequence[float],
    seed: int,
) -> dict[tuple[str, float], Method]:  # fmt: skip
    """Every kind of edit that needs no second run, at every strength: (name, strength) -> method."""
    known = {concept: known_features(saes, labels, concept, n) for concept in Concept.all()}

    def edit(kind: Any, features: Features, amount: float) -> tuple[Edit, ...]:
        return (Edit(kind, features, amount),) if features else ()

    def swap(own: Concept, wanted: Concept, amount: float) -> tuple[Edit, ...]:
        added = {(f.sae, f.index) for f in known[wanted]}
        gone = tuple(f for f in known[own] if (f.sae, f.index) not in added)
        return edit("scale", gone, 0.0) + edit("add", known[wanted], amount)

    ways: dict[str, Callable[[Concept, Concept, float], tuple[Edit, ...]]] = {
        "add": lambda _, wanted, s: edit("add", known[wanted], s),
        "set": lambda _, wanted, s: edit("set", known[wanted], s),
        "ablate and add": swap,
        "replace": lambda _, wanted, s: edit("replace", known[wanted], s),
        "add random": lambda _, wanted, s: edit("add", random_features(saes, known[wanted], f"{seed}/{wanted}"), s),
    }

    def at(way: Callable[[Concept, Concept, float], tuple[Edit, ...]], strength: float) -> Method:
        return by_concept(groups, lambda own, wanted: way(own, wanted, strength))

    return {(name, strength): at(way, strength) for name, way in ways.items() for strength in strengths}
