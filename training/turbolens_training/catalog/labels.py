"""Labels from ground truth: for every feature the attribute value, and the region, that lifts it.

Every candidate splits a population of units into positive and negative ones. Units of the region `thing` are the
things of the pictures, so that being on a thing is not mistaken for the thing's colour; of `background` and `picture`
one for each picture; of `cell` the cells of the grid. A unit's activation is the mean over its cells.

A candidate's score is its selectivity (`FeatureLabel.score` of the contract), taken over units; 1 is that and nothing
else. AUROC's z says whether it is real.
Candidates of attributes with more values say more when they are right, so the best is the one with the most bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from turbolens_server.catalog.labels import FeatureLabels, Label
from turbolens_server.sae.sae import Codes
from turbolens_training.activations.stream import Chunk
from turbolens_training.catalog.cells import BACKGROUND as BACKGROUND_CELL
from turbolens_training.catalog.cells import cell_owners
from turbolens_training.catalog.config import BuildConfig
from turbolens_training.measures.ranking import Active, Ranking, pool
from turbolens_training.mini.scenes import (
    BACKGROUND,
    BACKGROUNDS,
    COUNT,
    LAYOUT,
    LAYOUTS,
    PLACES,
    STYLE,
    STYLES,
    THING_FIELDS,
    jitter_from_noise,
    thing_column,
)

KEPT: Final = 5
"""Labels kept of each feature."""
_HALVES: Final = ("left", "right", "top", "bottom")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One split of a population."""

    values: int
    """Values that the attribute has."""
    attribute: str
    value: str
    region: str
    positive: Tensor  # [units] bool
    negative: Tensor  # [units] bool


def words(label: Label) -> str:
    """A label in plain words."""
    value, attribute, region = label.value, label.attribute, label.region
    plain: dict[str, Callable[[], str]] = {
        "thing": lambda: "on a thing" if value == "thing" else "background (off things)",
        "background": lambda: f"{value} background",
        "style": lambda: f"{value} style" + (" (on the thing)" if region == "thing" else ""),
        "position": lambda: "thing in the center" if value == "center" else f"thing on the {value}",
        "place": lambda: f"{value} half of the picture",
    }
    return plain[attribute]() if attribute in plain else f"{value} ({attribute} of the thing)"


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """What the cells, things and pictures of all looked-at scenes are."""

    codes: Tensor  # [pictures, CODE_DIM]
    owners: Tensor  # [pictures, cells]
    grid: tuple[int, int]

    def populations(self) -> Iterator[tuple[Tensor | None, int, list[Candidate]]]:
        """Each population: the unit of every cell [pictures * cells] (-1: none; None: the cell), size, splits."""
        pictures, cells = self.owners.shape
        yield None, pictures * cells, self._cell_candidates()

        picture = torch.arange(pictures)[:, None].expand(-1, cells)
        thing = torch.where(self.owners >= 0, 2 * picture + self.owners, -1).flatten()
        seen = torch.bincount(thing[thing >= 0], minlength=2 * pictures) > 0
        yield thing, 2 * pictures, self._thing_candidates(seen)

        off = self.owners == BACKGROUND_CELL
        ground = torch.where(off, picture, -1).flatten()
        yield ground, pictures, self._splits("background", "background", self._background(), off.any(1))
        styled = self._splits("style", "picture", self._style(), self.codes[:, COUNT] > 0)
        yield picture.flatten(), pictures, styled

    def _background(self) -> list[tuple[str, Tensor]]:
        return [(value, self.codes[:, BACKGROUND] == i) for i, value in enumerate(BACKGROUNDS)]

    def _style(self) -> list[tuple[str, Tensor]]:
        return [(value, self.codes[:, STYLE] == i) for i, value in enumerate(STYLES)]

    @staticmethod
    def _splits(attribute: str, region: str, values: list[tuple[str, Tensor]], among: Tensor) -> list[Candidate]:
        """Each value against all others, among the units given."""
        return [Candidate(len(values), attribute, value, region, among & has, among & ~has) for value, has in values]

    def _cell_candidates(self) -> list[Candidate]:
        on, off = (self.owners >= 0).flatten(), (self.owners == BACKGROUND_CELL).flatten()
        found = [Candidate(2, "thing", "thing", "cell", on, off), Candidate(2, "thing", "none", "cell", off, on)]
        rows, columns = self.grid
        at_left = (torch.arange(columns) < columns // 2).expand(rows, columns)
        at_top = (torch.arange(rows) < rows // 2)[:, None].expand(rows, columns)
        sides = dict(zip(_HALVES, (at_left, ~at_left, at_top, ~at_top), strict=True))
        for value, side in sides.items():
            inside = side.flatten().repeat(len(self.codes))
            found.append(Candidate(2, "place", value, "cell", inside, ~inside))
        return found

    def _thing_candidates(self, seen: Tensor) -> list[Candidate]:
        """Splits of the things [2 * pictures], those of picture i at 2 i and 2 i + 1; `seen` fill a cell or more."""
        found = []
        for field, vocabulary in THING_FIELDS:
            own = torch.stack([self.codes[:, thing_column(slot, field)] for slot in range(2)], 1).flatten()
            found += self._splits(field, "thing", [(value, own == i) for i, value in enumerate(vocabulary)], seen)
        style = [(value, has.repeat_interleave(2)) for value, has in self._style()]
        found += self._splits("style", "thing", style, seen)
        layout = self.codes[:, LAYOUT]
        places = {name: layout == LAYOUTS.index(name) for name in LAYOUTS}
        first_of = {"left": "left of", "top": "above"}
        second_of = {"right": "left of", "bottom": "above"}
        position = []
        for value in PLACES:
            first = places[value] | places.get(first_of.get(value, ""), torch.zeros_like(layout, dtype=torch.bool))
            second = places.get(second_of.get(value, ""), torch.zeros_like(layout, dtype=torch.bool))
            position.append((value, torch.stack([first, second], 1).flatten()))
        return found + self._splits("position", "thing", position, seen)


class Observations:
    """Sparse activations of every SAE over the looked-at pictures, and the scenes."""

    def __init__(self) -> None:
        self._codes: list[Tensor] = []
        self._jitter: list[Tensor] = []
        self._found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, chunk: Chunk, found: Mapping[str, Codes]) -> None:
        """Take in a chunk of one-step pictures, and what each SAE found in it [N, P, K]."""
        self._codes.append(chunk.codes)
        self._jitter.append(jitter_from_noise(chunk.updates.noise.float().cpu()))
        for name, codes in found.items():
            active = (codes.values > 0).cpu()
            counts = active.sum(-1).flatten().to(torch.int16)
            own = self._found.setdefault(name, [])
            own.append((counts, codes.indices.cpu()[active].int(), codes.values.cpu()[active]))

    def active(self, name: str) -> Active:
        """The activations of one SAE, with cells as units."""
        counts, features, values = (torch.cat(parts) for parts in zip(*self._found[name], strict=True))
        cells = torch.arange(len(counts)).repeat_interleave(counts.long())
        return Active(cells, features.long(), values, len(counts))

    def truth(self, grid: tuple[int, int]) -> GroundTruth:
        codes, jitter = torch.cat(self._codes), torch.cat(self._jitter)
        return GroundTruth(codes, cell_owners(codes, jitter, grid), grid)


def bits(selectivity: Tensor, values: int) -> Tensor:
    """What a feature's activation tells of an attribute with so many equally likely values, in bits.

    The positive value gets its share of a distribution over the values, the others share the rest evenly; the result
    is that distribution's divergence from the even one.
    """
    share = selectivity / (selectivity + (values - 1) * (1 - selectivity))
    rest = 1 - share
    told: Tensor = torch.xlogy(share, share * values) + torch.xlogy(rest, rest * values / (values - 1))
    return told / math.log(2)


def label_features(active: Active, truth: GroundTruth, d_sae: int, config: BuildConfig) -> list[FeatureLabels]:
    """Every feature's candidates that are real, the most telling first; the label is the first whose score suffices."""
    found: list[list[tuple[float, Label]]] = [[] for _ in range(d_sae)]
    for into, count, candidates in truth.populations():
        ranking = Ranking(active if into is None else pool(active, into, count), d_sae)
        for candidate in candidates:
            compared = ranking.compare(candidate.positive, candidate.negative)
            enough = ranking.active_units(candidate.positive | candidate.negative) >= config.least_active
            told = bits(compared.selectivity, candidate.values)
            for j in ((compared.z >= config.least_z) & (compared.selectivity > 0.5) & enough).nonzero()[:, 0].tolist():
                score = round(float(compared.selectivity[j]), 4)
                label = Label(candidate.attribute, candidate.value, candidate.region, score)
                found[j].append((float(told[j]), label))
    rows = []
    for j, real in enumerate(found):
        best = tuple(label for _, label in sorted(real, key=lambda pair: -pair[0])[:KEPT])
        good = bool(best) and best[0].score >= config.least_score
        rows.append(FeatureLabels(j, words(best[0]) if good else "", best[0].score if good else 0.0, best))
    return rows


def summary(block: str, rows: list[FeatureLabels]) -> dict[str, object]:
    """A block's row of the label table: share labelled, median score, and how many features go to each attribute."""
    good = [row for row in rows if row.label]
    found = [row.labels[0].attribute for row in good]
    counts = {name: found.count(name) for name in sorted(set(found), key=lambda name: -found.count(name))}
    return {
        "block": block,
        "labelled": round(len(good) / len(rows), 3),
        "median_score": round(float(np.median([row.label_score for row in good])), 3) if good else 0.0,
        "score_above_0.9": round(sum(row.label_score >= 0.9 for row in good) / len(rows), 3),
        "attributes": ", ".join(f"{name} {n}" for name, n in counts.items()),
    }
