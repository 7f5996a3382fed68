"""Labels by zero-shot matching: of candidate words the one that a feature's crops fit more than all others' do.

A word's margin is the mean cosine of the feature's crops with it, less that of the crops of all other features: words
that fit every picture do not win. Its z is the margin in standard errors, were the feature's crops drawn from the
others. The most that W words come to by chance grows with W, so the least z does: it is the normal quantile at which
all W words together label a feature by chance in the stated share of cases. Of the words that reach it the one with
the largest z is the label.

A label's score is an AUROC, see `FeatureLabel.score` of the contract; as of other labels' scores, 0.5 is chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from turbolens_server.catalog.labels import Example, FeatureLabels, Label
from turbolens_server.engine.engine import Engine
from turbolens_server.files import hash_file
from turbolens_training.catalog.config import LEAST_CROPS, BuildConfig
from turbolens_training.catalog.crops import Crops, embed_crops
from turbolens_training.catalog.encoder import Encoder, load_encoder
from turbolens_training.catalog.labels import KEPT
from turbolens_training.catalog.words import read_words, words_of_prompts

ATTRIBUTE: Final = "zero-shot"
"""Attribute of these labels."""
_WORDS: Final = 64
"""Words compared at once: ranks of all crops are kept for each."""
_NO_SPREAD: Final = 1e-6
"""Cosines that differ by less are equal, to float32's precision."""


class Namer:
    """An encoder with words to label with."""

    def __init__(self, encoder: Encoder, words: Sequence[str], words_from: Path | None, chance: float) -> None:
        """Take the parts.

        Args:
            encoder: what embeds.
            words: the candidates.
            words_from: the file that they were read from; None: the prompts.
            chance: share of features that may get a label by chance.
        """
        self._encoder, self._words, self._chance = encoder, list(words), chance
        source = {} if words_from is None else {"words": words_from.name, "words_hash": hash_file(words_from)}
        self.provenance = {
            "encoder": encoder.name,
            "encoder_hash": encoder.hash,
            "words": "of the prompts",
            **source,
            "candidates": len(self._words),
            "chance": chance,
            "least_z": round(least_z(len(self._words), chance), 3),
        }
        """What a bundle's provenance says of its labels."""

    def name(
        self, engine: Engine, examples: Mapping[str, Sequence[Sequence[Example]]]
    ) -> dict[str, dict[int, FeatureLabels]]:
        """Label features by their top examples.

        Args:
            engine: the model, which draws the examples again.
            examples: by hook point, those of every feature of its SAE.

        Returns:
            By hook point and index the features that got a label.
        """
        self._encoder.to(engine.device)
        crops = embed_crops(engine, self._encoder, examples)
        embedded = self._encoder.embed_texts(self._words)
        return {
            block: match_words(crops[block], self._words, embedded, len(of_features), self._chance)
            for block, of_features in examples.items()
        }


def load_namer(config: BuildConfig, encoder: str, prompts: Sequence[str]) -> Namer:
    """The encoder by folder or hub id, and the words: those of the settings' file, or else of the prompts.

    Raises:
        LoadError: there is no such encoder.
        ValueError: the words or the encoder cannot be used.
    """
    words = words_of_prompts(prompts) if config.words is None else read_words(config.words)
    return Namer(load_encoder(encoder), words, config.words, config.chance)


def without_zero_shot(known: Mapping[int, FeatureLabels]) -> dict[int, FeatureLabels]:
    """Known features, those without a label that an earlier encoder named: provenance tells of one encoder."""
    return {i: f for i, f in known.items() if not (f.labels and f.labels[0].attribute == ATTRIBUTE)}


def least_z(words: int, chance: float) -> float:
    """The z at which one of so many words is reached by chance in the given share of features."""
    return float(norm.isf(chance / words))


def compare(cosines: Tensor, features: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """How much more the crops of each feature fit each word than those of all other features do.

    Args:
        cosines: [E, W] of E crops with W words.
        features: [E] int64, whose crop each is.
        d_sae: features.

    Returns:
        z and AUROC, [d_sae, W] float64 each; 0 and 0.5 for features with fewer than `LEAST_CROPS` crops.
    """
    exact = cosines.double()

    def per_feature(values: Tensor) -> Tensor:
        return torch.zeros(d_sae, values.shape[1], dtype=torch.float64).index_add_(0, features, values)

    own, squares = per_feature(exact), per_feature(exact.square())
    count = torch.bincount(features, minlength=d_sae).double()[:, None]
    others = len(exact) - count
    enough = (count >= LEAST_CROPS) & (others >= LEAST_CROPS)
    count, others = count.clamp(min=1), others.clamp(min=1)
    rest = (exact.sum(0) - own) / others
    spread = ((exact.square().sum(0) - squares) / others - rest.square()).clamp(min=_NO_SPREAD**2).sqrt()
    z = (own / count - rest) / (spread * (1 / count + 1 / others).sqrt())
    ranks = per_feature(torch.from_numpy(rankdata(exact.numpy(), axis=0)))  # of ties the middle
    auroc = (ranks - count * (count + 1) / 2) / (count * others)
    return torch.where(enough, z, 0.0), torch.where(enough, auroc, 0.5)


def match_words(
    crops: Crops, words: Sequence[str], embedded: Tensor, d_sae: int, chance: float
) -> dict[int, FeatureLabels]:
    """The features that words fit, each with its best words, the best first.

    Args:
        crops: of all features of one SAE.
        words: W candidates.
        embedded: [W, D], the words, norm 1.
        d_sae: features.
        chance: share of features that may get a label by chance.
    """
    if not len(crops.features):
        return {}
    parts = [compare(crops.embedded @ some.T, crops.features, d_sae) for some in embedded.split(_WORDS)]
    z, auroc = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    found = {}
    best = z.topk(min(KEPT, len(words)))
    for feature in (best.values[:, 0] >= (least := least_z(len(words), chance))).nonzero()[:, 0].tolist():
        labels = tuple(
            Label(ATTRIBUTE, words[word], "", round(float(auroc[feature, word]), 4))
            for word, reached in zip(best.indices[feature].tolist(), best.values[feature].tolist(), strict=True)
            if reached >= least
        )
        found[feature] = FeatureLabels(feature, labels[0].value, labels[0].score, labels)
    return found
