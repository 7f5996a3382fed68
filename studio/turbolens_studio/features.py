"""What the catalogue knows, kept; and what can be told of features by looking at runs."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

import turbolens as tl
from turbolens_studio.wire import Run
from turbolens_studio.workshop import Workshop

FloatGrid = npt.NDArray[np.float32]
Sort = Literal["best", "frequency", "rare", "mean", "index"]
_SORTS: Final[dict[Sort, Any]] = {
    "best": lambda f: (f.ref.index,),  # see `by_use`
    "frequency": lambda f: (-f.frequency, f.ref.index),
    "rare": lambda f: (f.frequency == 0, f.frequency, f.ref.index),
    "mean": lambda f: (-f.mean, f.ref.index),
    "index": lambda f: (f.ref.index,),
}
_FOUND: Final = 100
_THUMB_PIXELS: Final = 192
_THUMBS_KEPT: Final = 4000


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which features to list, and how."""

    words: str = ""
    block: str = ""
    attribute: str = ""
    least_frequency: float = 0.0
    most_frequency: float = 1.0
    least_score: float = 0.0
    sort: Sort = "best"
    start: int = 0
    count: int = 48

    def __post_init__(self) -> None:
        if self.sort not in _SORTS:
            raise ValueError(f"sort: got {self.sort!r}, expected one of {', '.join(_SORTS)}")
        if not 0 < self.count <= 200 or self.start < 0:
            raise ValueError(f"count: got {self.count} from {self.start}, expected 1 to 200 from 0")

    def holds(self, feature: tl.Feature) -> bool:
        """Whether a feature passes the filters."""
        return (
            (not self.attribute or any(label.attribute == self.attribute for label in feature.labels))
            and self.least_frequency <= feature.frequency <= self.most_frequency
            and feature.label_score >= self.least_score
        )


class Atlas:
    """All features of the server that is there now."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._rows: dict[str, list[tl.Feature]] = {}
        self._thumbs: dict[tl.FeatureRef, bytes] = {}
        self._generation = -1
        self._reading = asyncio.Lock()

    async def rows(self, sae: str) -> list[tl.Feature]:
        """Every feature of an SAE; read once for each server."""
        connection = self._workshop.connection
        async with self._reading:
            if self._generation != connection.generation:
                self._rows, self._thumbs, self._generation = {}, {}, connection.generation
            if sae not in self._rows:
                self._rows[sae] = [feature async for feature in connection.lens.list_features(sae)]
            return self._rows[sae]

    async def known_in(self, blocks: Iterable[tl.BlockFeatures]) -> dict[str, dict[str, Any]]:
        """What is known of the features that fire in a run, by "SAE/index"."""
        active: dict[str, set[int]] = {}
        for block in blocks:
            active.setdefault(block.sae, set()).update(np.unique(block.indices).tolist())
        known: dict[str, dict[str, Any]] = {}
        for sae, indices in active.items():
            try:
                rows = await self.rows(sae)
            except tl.TurboLensError:
                continue  # a picture without its features' names is worth more than none
            known |= {f"{sae}/{index}": brief(rows[index]) for index in sorted(indices) if index < len(rows)}
        return known

    async def listing(self, wanted: Wanted) -> dict[str, Any]:
        """Features by words or by filters, and how many there are of each block and attribute."""
        saes = [wanted.block] if wanted.block else [sae.name for sae in self._workshop.connection.model.saes]
        why: dict[tl.FeatureRef, tl.Match] = {}
        if wanted.words.strip():
            lens = self._workshop.connection.lens
            matches = await lens.search_features(wanted.words, block=wanted.block or None, limit=_FOUND)
            why = {match.ref: match for match in matches}
            found = [match.feature for match in matches]
        else:
            found = [feature for sae in saes for feature in await self.rows(sae)]
        attributes = Counter(name for f in found for name in {label.attribute for label in f.labels[:1]})
        passed = [feature for feature in found if wanted.holds(feature)]
        if not why:
            passed.sort(key=_SORTS[wanted.sort])
            if wanted.sort == "best":
                passed = by_use(passed)
        page = passed[wanted.start : wanted.start + wanted.count]
        return {
            "features": [
                brief(f) | ({"match": why[f.ref].score, "reason": why[f.ref].reason} if f.ref in why else {})
                for f in page
            ],
            "total": len(passed),
            "attributes": dict(attributes.most_common()),
        }

    async def contrast(self, run: Run, region: FloatGrid, count: int = 24) -> list[dict[str, Any]]:
        """The features that a region of a run's picture has more of than the rest of it, by effect.

        Args:
            run: the picture's.
            region: weights in [0, 1], of any size, stretched over the picture.
            count: at most so many.

        Raises:
            ValueError: the region covers no cell of a grid, or all of them.
        """
        found = await self._workshop.connection.lens.extract(
            run.prompt, seed=run.seed, steps=run.steps, steer=run.edits, float32=True
        )
        return [
            brief((await self.rows(one.ref.sae))[one.ref.index])
            | {"inside": one.inside, "outside": one.outside, "effect": one.effect}
            for one in found.inside(tl.mask(region), limit=count)
            if one.inside > one.outside
        ]

    async def thumb(self, ref: tl.FeatureRef) -> bytes:
        """A small JPEG of where a feature fires: its strongest example, dark where the feature is not.

        Of a feature without examples: what the block draws of it alone, on the empty prompt.
        """
        await self.rows(ref.sae)  # forgets those of another server
        if ref not in self._thumbs:
            lens = self._workshop.connection.lens
            feature = await lens.get_feature(ref)
            if feature.examples:
                best = feature.examples[0]
                made = await lens.generate(
                    best.prompt, seed=best.seed, steps=best.steps, only=ref, float32=True, format="raw"
                )
                heat = made.features[ref.sae].heatmap(ref) if ref.sae in made.features else None
            else:
                made = await lens.generate(
                    "",
                    seed=0,
                    steer=[tl.replace(ref, feature.icon_strength or 4)] if feature.mean else [],
                    format="raw",
                )
                heat = None
            if len(self._thumbs) >= _THUMBS_KEPT:
                self._thumbs.clear()
            self._thumbs[ref] = await asyncio.to_thread(lit, made.image, heat)
        return self._thumbs[ref]


def by_use(features: Sequence[tl.Feature]) -> list[tl.Feature]:
    """Features by how sure their label is times how common they are: one half at the median of those ever active.

    A feature that hardly ever fires can be perfectly pure and yet do little.
    """
    active = [feature.frequency for feature in features if feature.frequency > 0]
    usual = float(np.median(active)) if active else 1.0

    def use(feature: tl.Feature) -> float:
        return max(0.0, 2 * feature.label_score - 1) * feature.frequency / (feature.frequency + usual)

    return sorted(features, key=use, reverse=True)


def lit(picture: Image.Image, heat: FloatGrid | None) -> bytes:
    """A JPEG of a picture, dark where the heat is low."""
    small = picture.copy()
    small.thumbnail((_THUMB_PIXELS, _THUMB_PIXELS))
    if heat is not None and heat.max() > 0:
        light = Image.fromarray(np.sqrt(heat / heat.max()).astype(np.float32)).resize(
            small.size, Image.Resampling.BICUBIC
        )
        share = 0.25 + 0.75 * np.clip(np.asarray(light), 0, 1)[..., None]
        small = Image.fromarray((np.asarray(small, np.float32) * share).round().astype(np.uint8))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return file.getvalue()


def brief(feature: tl.Feature) -> dict[str, Any]:
    """A feature as a page lists it."""
    return {
        "sae": feature.ref.sae,
        "index": feature.ref.index,
        "label": feature.label,
        "labelScore": feature.label_score,
        "frequency": feature.frequency,
        "mean": feature.mean,
        "max": feature.max,
        "attribute": feature.labels[0].attribute if feature.labels else "",
    }


def whole(feature: tl.Feature) -> dict[str, Any]:
    """A feature with all that is known of it."""
    return brief(feature) | {
        "iconStrength": feature.icon_strength,
        "labels": [dataclasses.asdict(label) for label in feature.labels],
        "examples": [dataclasses.asdict(example) | {"seed": str(example.seed)} for example in feature.examples],
    }
