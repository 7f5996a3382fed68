"""Words to features: by the words of their labels first, by the model's own text encoder where no word is near."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_PART: Final = 0.9
"""One word of a label of several."""
_PREFIX: Final = 0.8
_TYPO: Final = 0.7
_TYPO_RATIO: Final = 0.75
_MEANING: Final = 0.4  # what the text encoder alone can give: it knows words, not labels
_LEAST_COSINE: Final = 0.75
"""Below it any word is as near to some label."""


@dataclasses.dataclass(frozen=True, slots=True)
class Nearness:
    """How near a label's value is to a query, and by what."""

    score: float
    """0 to 1."""
    how: str


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def nearness(
    query: Sequence[str],
    value: str,
    synonyms: Mapping[str, Sequence[str]],
    cosine: float,
    known: frozenset[str] = frozenset(),
) -> Nearness:
    """How near a label's value is to the words of a query.

    Args:
        query: words in lower case.
        value: the label's value, of one word or several.
        synonyms: other words for a value.
        cosine: of the query's and the value's text embeddings.
        known: words that some label has; of these nothing is guessed: "night" is not a misspelt "right".
    """
    names = {value.lower(): "word", **{word.lower(): "synonym" for word in synonyms.get(value, ())}}
    guess = cosine >= _LEAST_COSINE and not known.issuperset(query)
    best = Nearness(_MEANING * min(cosine, 1.0) if guess else 0.0, "meaning")
    for name, kind in names.items():
        parts = words_of(name)
        if parts == list(query):
            best = max(best, Nearness(1.0, kind), key=lambda n: n.score)
        whole = 1.0 if len(parts) == 1 else _PART
        for word in query:
            for part in parts:
                if word == part:
                    found = Nearness(whole, kind)
                elif len(word) >= 3 and part.startswith(word):
                    found = Nearness(_PREFIX * whole, "prefix")
                elif len(word) >= 4 and word not in known and _alike(word, part):
                    found = Nearness(_TYPO * whole, "spelling")
                else:
                    continue
                best = max(best, found, key=lambda n: n.score)
    return best


@functools.lru_cache(maxsize=1 << 16)  # labels of thousands of features share their words
def _alike(word: str, part: str) -> bool:
    """Whether one may be the other misspelt."""
    return difflib.SequenceMatcher(None, word, part).ratio() >= _TYPO_RATIO


def sureness(score: float) -> float:
    """How sure a label is, 0 to 1, from its score, of which 0.5 is chance."""
    return float(np.clip(2 * (score - 0.5), 0, 1))


def commonness(frequency: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How much a feature can be relied on to be there, in [0, 1), by how often each of an SAE's is active.

    One half at the median of those that are ever active. One that hardly ever is can be perfectly selective and still
    move little.
    """
    usual = float(np.median(frequency[frequency > 0])) if (frequency > 0).any() else 1.0
    return (frequency / (frequency + usual)).astype(np.float32)


def cosines(
    query: npt.NDArray[np.float32], vectors: Mapping[str, npt.NDArray[np.float32]], center: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Cosine of a query's embedding with each value's, around their common mean: encoders put all texts close."""

    def unit(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        moved = vector - center
        return moved / max(float(np.linalg.norm(moved)), 1e-6)

    asked = unit(query)
    return {value: float(asked @ unit(vector)) for value, vector in vectors.items()}
