"""What is known of every feature of every SAE served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from turbolens_server.catalog.labels import FeatureLabels, read_labels
from turbolens_server.catalog.query import Feature
from turbolens_server.catalog.search import commonness, cosines, nearness, sureness, words_of
from turbolens_server.engine.info import SaeInfo
from turbolens_server.sae.bundle import BundleError

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
_MOST_EMBEDDED: Final = 2000
"""Distinct labels whose meaning is embedded at the start; of more than that, search goes by their words alone."""
_SECOND_MEANING: Final = 0.5
"""What a label that is not the feature's best counts for: the feature stands for something else first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A feature found by words."""

    feature: Feature
    score: float
    """How well it answers, 0 to 1."""
    reason: str
    """By which label, and how."""


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """A feature near to another."""

    feature: Feature
    cosine: float
    """Of the two decoder directions."""


class Catalog:
    """Statistics and labels of all features, in memory; immutable after construction."""

    def __init__(self, saes: Mapping[str, SaeInfo], embed: Embed) -> None:
        """Read the labels of every bundle; `embed` is the model's text encoder, asked once for the labels' words.

        Raises:
            BundleError: a labels file or a bundle's synonyms are malformed.
        """
        labels = {name: read_labels(s.bundle.folder, s.bundle.d_sae) for name, s in saes.items()}
        self._features = {name: _features(sae, labels[name]) for name, sae in saes.items()}
        self._synonyms = {name: _synonyms(sae) for name, sae in saes.items()}
        self._values = {
            name: {label.value for known in by_feature.values() for label in known.labels}
            for name, by_feature in labels.items()
        }
        self._decoders = {name: sae.bundle.weights.W_dec for name, sae in saes.items()}
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
        directions = self._decoders[sae].float()
        cosines = torch.nn.functional.cosine_similarity(directions, directions[index], dim=1)
        cosines[index] = -torch.inf
        best = torch.topk(cosines, min(most, len(cosines) - 1))
        features = self._features[sae]
        return [Near(features[int(i)], float(cosine)) for cosine, i in zip(best.values, best.indices, strict=True)]

    def search(self, words: str, saes: Iterable[str], most: int, embedded: npt.NDArray[np.float32]) -> list[Match]:
        """Features for words, best first: how near a label is to the words, times how sure the label is, times how
        common the feature is among its SAE's, where that was measured.

        Args:
            words: one or a few.
            saes: where to look; none: in all.
            most: at most so many.
            embedded: the words by the text encoder.
        """
        query = words_of(words)
        meaning = cosines(embedded, self._vectors, self._center)
        found: list[Match] = []
        for sae in dict.fromkeys(saes) or self._features:
            near = {v: nearness(query, v, self._synonyms[sae], meaning.get(v, 0.0)) for v in self._values[sae]}
            for feature in self._features[sae]:
                best = max(
                    (
                        (near[lb.value].score * sureness(lb.score) * (1.0 if rank == 0 else _SECOND_MEANING), lb)
                        for rank, lb in enumerate(feature.labels)
                    ),
                    key=lambda pair: pair[0],
                    default=None,
                )
                if best is not None and best[0] > 0:
                    score, label = best[0] * float(self._common[sae][feature.index]), best[1]
                    found.append(Match(feature, score, f"{label.attribute}={label.value}: {near[label.value].how}"))
        found.sort(key=lambda match: -match.score)
        return found[:most]


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
        features.append(Feature(sae.name, index, label, score, frequency, mean, largest, tuple(every), tuple(examples)))
    return features
