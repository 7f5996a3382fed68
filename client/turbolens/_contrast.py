"""Which features tell two sets of prompts apart."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from turbolens._edits import FeatureRef
from turbolens._many.prompts import Item, Prompts, items
from turbolens._ranks import Floats, false_discovery, separate
from turbolens._table import Table

if TYPE_CHECKING:
    from turbolens._async import AsyncLens

_LEAST: Final = 3
"""Prompts of a set: with fewer no difference is beyond chance."""


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """A feature that may tell two sets of prompts apart; goes straight into an edit."""

    ref: FeatureRef
    label: str
    effect: float
    """Cliff's delta: the chance that a prompt of the first set has it stronger than one of the second, minus that of
    the reverse; -1 to 1."""
    mean: float
    """Of the first set, its mean activation over steps and positions, zeros counted."""
    other: float
    """Of the second."""
    p: float
    """Of a two-sided Mann-Whitney test, by the normal approximation with ties and continuity corrected."""
    q: float
    """The same corrected for as many tests as features were active in either set (Benjamini and Hochberg, 1995)."""


async def contrast(
    lens: AsyncLens, prompts: Prompts, others: Prompts, seeds: Sequence[int], limit: int, options: Mapping[str, Any]
) -> Table:
    """See :meth:`Lens.contrast`."""
    sets = [list(items(given, seeds, "prompt")) for given in (prompts, others)]
    if fewest := [len(given) for given in sets if len(given) < _LEAST]:
        raise ValueError(f"a set of {fewest[0]} prompts; give at least {_LEAST} in each, better ten or more")

    async def means(item: Item) -> dict[str, Floats]:
        """Of one prompt: the mean over seeds, which are no samples of their own."""
        runs = await lens.extract(item.prompt, seeds=item.seeds, **options)
        return {sae: np.mean([run[sae].means() for run in runs], axis=0) for sae in runs[0]}

    found = await asyncio.gather(*(means(item) for given in sets for item in given))
    ours, theirs = found[: len(sets[0])], found[len(sets[0]) :]
    rows: list[Difference] = []
    for sae in found[0]:
        a, b = (np.stack([one[sae] for one in side]) for side in (ours, theirs))
        active = np.flatnonzero((a.max(0) > 0) | (b.max(0) > 0))
        effects, p = separate(a[:, active], b[:, active])
        labels = lens._labels.of(sae)
        rows += [
            Difference(
                FeatureRef(sae, int(index)), labels.get(int(index), ""), float(effects[i]),
                float(a[:, index].mean()), float(b[:, index].mean()), float(p[i]), 1.0,
            )
            for i, index in enumerate(active)
        ]  # fmt: skip
    corrected = false_discovery(np.array([row.p for row in rows]))
    rows = [dataclasses.replace(row, q=float(q)) for row, q in zip(rows, corrected, strict=True)]
    rows.sort(key=lambda row: (-abs(row.effect), row.q, -abs(row.mean - row.other)))
    return Table(rows[:limit], ("ref", "label", "effect", "mean", "other", "p", "q"))
