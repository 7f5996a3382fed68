"""What is known of every feature of every SAE served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from turbolens_server.catalog.co_firing import read_co_firing
from turbolens_server.catalog.labels import Effect, FeatureLabels, Label, read_labels
from turbolens_server.catalog.query import Feature
from turbolens_server.catalog.search import Nearness, commonness, cosines, nearness, sureness, words_of
from turbolens_server.engine.info import SaeInfo
from turbolens_server.sae.bundle import BundleError

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
_MOST_EMBEDDED: Final = 2000
"""Distinct labels whose meaning is embedded at the start; of more than that, search goes by their words alone."""
_LATER: Final = 0.95
"""What each further place in a group counts for."""
_TOLD: Final = 40
"""Values that a hint names."""
_SECOND_MEANING: Final = 0.5
"""What a label that is not the feature's best counts for: the feature stands for something else first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A feature found by words."""

    feature: Feature
    score: float
    """How well it answers, 0 to 1."""
    reason: str
    """By what, and how."""


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """A feature near to another."""

    feature: Feature
    cosine: float
    """Of the two decoder directions."""
    jaccard: float | None = None
    """Of the positions where they are active; None where that was not asked for."""


class Catalog:
    """Statistics and labels of all features, in memory; immutable after construction."""

    def __init__(self, saes: Mapping[str, SaeInfo], embed: Embed) -> None:
        """Read the labels of every bundle; `embed` is the model's text encoder, asked once for the labels' words.

        Raises:
            BundleError: a file of what is known of features, or a bundle's synonyms, are malformed.
        """
        labels = {name: read_labels(s.bundle.folder, s.bundle.d_sae) for name, s in saes.items()}
        self._features = {name: _features(sae, labels[name]) for name, sae in saes.items()}
        self._synonyms = {name: _synonyms(sae) for name, sae in saes.items()}
        self._values = {
            name: {label.value for known in by_feature.values() for label in known.labels}
            | {effect.value for known in by_feature.values() for effect in known.effects}
            for name, by_feature in labels.items()
        }
        self._words = {
            name: {
                word
                for value in values
                for one in (value, *self._synonyms[name].get(value, ()))
                for word in words_of(one)
            }
            for name, values in self._values.items()
        }
        """The words of an SAE's labels, synonyms included."""
        self._moved = {name: moved for name, sae in saes.items() if (moved := measured_attributes(sae))}
        """By SAE whose features' effects were measured: the attributes."""
        self._grouped = {
            (e.attribute, e.value) for by_feature in labels.values() for one in by_feature.values() for e in one.effects
        }
        """What some group of features moves pictures to."""
        self._decoders = {name: sae.bundle.weights.W_dec for name, sae in saes.items()}
        self._together = {name: read_co_firing(sae.bundle.folder, sae.bundle.d_sae) for name, sae in saes.items()}
        self._common = {name: _common(sae) for name, sae in saes.items()}
        """By SAE and feature: how far it can be relied on to be there, 1 where nobody measured."""
        values = sorted(set().union(*self._values.values()))
        values = values if len(values) <= _MOST_EMBEDDED else []
        vectors = embed(values) if values else np.zeros((0, 1), np.float32)
        self._vectors = dict(zip(values, vectors, strict=True))
        self._center: npt.NDArray[np.float32] = vectors.mean(0) if values else np.zeros(1, np.float32)

    @property
    def saes(self) -> tuple[str, ...]:
        """Names of the SAEs."""
        return tuple(self._features)

    def label_counts(self) -> dict[str, int]:
        """Features with a label, by SAE."""
        return {name: sum(bool(feature.label) for feature in every) for name, every in self._features.items()}

    def labels_of(self, sae: str) -> Mapping[int, str]:
        """What the features of an SAE stand for, those that have a label."""
        return {feature.index: feature.label for feature in self._features[sae] if feature.label}

    def features(self, sae: str) -> Sequence[Feature]:
        """Every feature of an SAE, by index.

        Raises:
            KeyError: there is no such SAE.
        """
        return self._features[sae]

    def direction(self, sae: str, index: int) -> list[float]:
        """A feature's decoder row, [d_model]."""
        return [float(value) for value in self._decoders[sae][index].float()]

    def nearest(self, sae: str, index: int, most: int) -> list[Near]:
        """The features of an SAE by the cosine of their decoder direction with one feature's, nearest first."""
        cosines = self._cosines(sae, index)
        cosines[index] = -torch.inf
        best = torch.topk(cosines, min(most, len(cosines) - 1))
        features = self._features[sae]
        return [Near(features[int(i)], float(cosine)) for cosine, i in zip(best.values, best.indices, strict=True)]

    def co_firing(self, sae: str, index: int, most: int) -> list[Near] | None:
        """The features of an SAE that fire with one most, the first first; None where nobody counted."""
        found = self._together[sae]
        if found is None:
            return None
        cosines, features = self._cosines(sae, index), self._features[sae]
        return [Near(features[i], float(cosines[i]), share) for i, share in found.of(index)[:most]]

    def _cosines(self, sae: str, index: int) -> torch.Tensor:
        directions = self._decoders[sae].float()
        return torch.nn.functional.cosine_similarity(directions, directions[index], dim=1)

    def search(self, words: str, saes: Iterable[str], most: int, embedded: npt.NDArray[np.float32]) -> list[Match]:
        """Features for words, best first.

        Where it was measured what an SAE's features move: how near a value is to the words, times how well the feature
        moves pictures to it and leaves all else alone; what moves nothing is left out. Elsewhere: how near a label is,
        times how sure it is, times how common the feature is among its SAE's, where that was measured.

        Args:
            words: one or a few.
            saes: where to look; none: in all.
            most: at most so many.
            embedded: the words by the text encoder.
        """
        query = words_of(words)
        meaning = cosines(embedded, self._vectors, self._center)
        searched = tuple(dict.fromkeys(saes) or self._features)
        known = frozenset().union(*(self._words[sae] for sae in searched))
        found: list[Match] = []
        for sae in searched:
            synonyms = self._synonyms[sae]
            near = {v: nearness(query, v, synonyms, meaning.get(v, 0.0), known) for v in self._values[sae]}
            answers = self._by_effects if sae in self._moved else self._by_labels
            found += answers(sae, near)
        found.sort(key=lambda match: -match.score)
        return found[:most]

    def _by_effects(self, sae: str, near: Mapping[str, Nearness]) -> Iterator[Match]:
        """By what moves pictures to a value; labels tell where no group was found that does."""
        if not any(feature.effects for feature in self._features[sae]):
            return  # nothing that this block writes reaches the picture
        every = sorted((e for feature in self._features[sae] for e in feature.effects), key=lambda e: e.rank)
        whole = {(e.attribute, e.value): e for e in every}  # the last of each group
        for feature in self._features[sae]:
            ways = []
            for one in feature.effects:
                group = whole[one.attribute, one.value]
                how = f"{_how(one, near)}, {group.rank} together move {group.moved:.0%} of pictures"
                if (score := near[one.value].score * group.score * _LATER ** (one.rank - 1)) > 0:
                    ways.append((score, how))
            for score, how, label in self._labelled(sae, feature, near):
                if label.attribute not in self._moved[sae] or (label.attribute, label.value) not in self._grouped:
                    ways.append((score, how))
            if ways:
                yield Match(feature, *max(ways))

    def _by_labels(self, sae: str, near: Mapping[str, Nearness]) -> Iterator[Match]:
        for feature in self._features[sae]:
            if ways := [(score, how) for score, how, _ in self._labelled(sae, feature, near)]:
                yield Match(feature, *max(ways))

    def _labelled(self, sae: str, feature: Feature, near: Mapping[str, Nearness]) -> Iterator[tuple[float, str, Label]]:
        """By labels that are near and surer than chance; a feature that was never seen to be active has score 0."""
        common = float(self._common[sae][feature.index])
        for rank, label in enumerate(feature.labels):
            sure = sureness(label.score) * (1.0 if rank == 0 else _SECOND_MEANING)
            if (fits := near[label.value].score * sure) > 0:
                yield fits * common, _how(label, near), label

    def hint(self, words: str, saes: Iterable[str]) -> str:
        """Why a search found nothing, and what would help."""
        searched = tuple(dict.fromkeys(saes) or self._features)
        values = sorted(set().union(*(self._values[sae] for sae in searched)))
        if not searched:
            return "this server has no SAE; serve one by --sae"
        if not values:
            return (
                f"{', '.join(searched)} ha{'s' if len(searched) == 1 else 've'} no labels: make them by turbolens "
                "catalog build, or take those of others by turbolens catalog import-labels"
            )
        query = words_of(words)
        if fit := [v for v in values if nearness(query, v, {}, 0.0).score > 0]:
            return f"features are labelled {fit[0]!r}, but none moves pictures to it; list_features shows them"
        told = ", ".join(values[:_TOLD]) + (", ..." if len(values) > _TOLD else "")
        return f"nothing fits {words!r}; labels say {told}"


def _how(one: Label | Effect, near: Mapping[str, Nearness]) -> str:
    return f"{one.attribute}={one.value}: {near[one.value].how}"


def measured_attributes(sae: SaeInfo) -> frozenset[str]:
    """The attributes to which it was measured what an SAE's features move pictures; none where nobody did."""
    found = (sae.bundle.provenance.get("catalog") or {}).get("effects") or {}
    return frozenset(found.get("attributes", ()))


def _synonyms(sae: SaeInfo) -> dict[str, list[str]]:
    """Other words for labels' values, which a bundle may bring."""
    found = sae.bundle.provenance.get("synonyms", {})
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise BundleError(f'{sae.name}: provenance.json has synonyms of another form than {{"blue": ["azure"]}}')
    return dict(found)


def _common(sae: SaeInfo) -> npt.NDArray[np.float32]:
    measured = sae.bundle.measured
    return np.ones(sae.bundle.d_sae, np.float32) if measured is None else commonness(measured.frequency)


def _features(sae: SaeInfo, labels: Mapping[int, FeatureLabels]) -> list[Feature]:
    stats, features = sae.bundle.stats, []
    for index in range(sae.bundle.d_sae):
        known = labels.get(index)
        frequency = mean = largest = 0.0
        if stats is not None:
            frequency, mean, largest = (float(v[index]) for v in (stats.frequency, stats.mean, stats.max))
        label, score, every, examples = (
            (known.label, known.label_score, known.labels, known.examples) if known else ("", 0.0, (), ())
        )
        effects, icon = (known.effects, known.icon_strength) if known else ((), None)
        features.append(
            Feature(
                sae.name, index, label, score, frequency, mean, largest, tuple(every), tuple(examples), effects, icon
            )
        )
    return features
