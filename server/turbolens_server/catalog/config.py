"""Settings of `turbolens catalog import-labels`; the docstrings are the command's help."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportLabelsConfig:
    """Give a bundle's features the labels of a file that others made: CSV, JSON, JSON Lines or Parquet.

    They take the place of the bundle's labels; statistics and top examples stay. Whose they are and under which
    licence goes into the bundle's provenance.

    Example: turbolens catalog import-labels up.0.1.json --sae ./sdxl-saes/up.0.1 --index feature_id
    --attribute category --score confidence --score-words high=0.9 medium=0.75 low=0.6
    --source hammamiomar/sdxl-turbo-sae-labels --licence MIT
    """

    file: Positional[Path]
    """The labels, a row for each feature; its ending says the format."""
    sae: Path
    """The bundle."""
    source: str
    """Where the labels are from, such as a hub id or an address."""
    licence: str
    """Licence of the labels."""
    index: str = "index"
    """Column of the feature's index."""
    label: str = "label"
    """Column of the label in words."""
    score: str | None = None
    """Column of how sure a label is, from 0.5 (chance) to 1, or of a word for it."""
    score_words: tuple[str, ...] = ()
    """What words of the score's column stand for, each `word=score`."""
    assumed_score: float = 0.75
    """How sure labels without a score are taken to be; search ranks by it."""
    attribute: str | None = None
    """Column of what kind of thing a label is, such as its category; left out: `label`."""
    block: str | None = None
    """Column of the block; rows of other blocks than the bundle's are left out."""
    unlabelled: tuple[str, ...] = ("unlabeled", "unlabelled")
    """Labels that stand for none."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.assumed_score <= 1:
            raise ValueError(f"assumed_score={self.assumed_score}, expected 0.5 to 1")
        if not (self.source.strip() and self.licence.strip()):
            raise ValueError("source and licence must not be empty")
        try:
            ranged = all(0.5 <= score <= 1 for score in self.words.values())
        except ValueError:
            ranged = False
        if not ranged:
            raise ValueError(f"score_words={self.score_words}, expected each word=score, with scores from 0.5 to 1")

    @property
    def words(self) -> dict[str, float]:
        """The score of each word."""
        return {word: float(score) for word, _, score in (pair.rpartition("=") for pair in self.score_words)}
