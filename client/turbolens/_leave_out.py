"""Which word made a feature fire, the long way round: by leaving each out of the prompt."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from turbolens._attribution import Position
from turbolens._edits import FeatureRef, Mask
from turbolens._table import Table

if TYPE_CHECKING:
    from turbolens._async import AsyncLens

_WORD = re.compile(r"\w[\w'-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
    """What a feature's pre-activation loses when a word is left out of the prompt."""

    word: str
    drop: float
    """Of the pre-activation, mean over the positions looked at; negative where it rises without the word."""
    share: float
    """Of all that drops, 0 to 1; 0 where it rises."""
    prompt: str
    """Without the word."""


def shortened(prompt: str) -> Iterator[tuple[str, str]]:
    """Each word of a prompt, wherever it stands, with the prompt without it."""
    for found in _WORD.finditer(prompt):
        before, after = prompt[: found.start()], prompt[found.end() :]
        yield found.group(), (before + after.lstrip()).strip()


async def leave_out(
    lens: AsyncLens,
    prompt: str,
    feature: FeatureRef,
    seed: int | None,
    step: int | None,
    at: Position | None,
    region: Mask | None,
    options: Mapping[str, Any],
) -> Table:
    """See :meth:`Lens.leave_out`."""
    own = await lens.attribute(prompt, feature, seed=seed, step=step, **options)
    weights = own.weights(at, region)
    words = list(shortened(prompt))
    asked = (lens.attribute(rest, feature, seed=own.seed, step=own.step, **options) for _, rest in words)
    others = await asyncio.gather(*asked)
    drops = [float(weights @ (own.pre - other.pre).ravel()) for other in others]
    lost = sum(max(drop, 0.0) for drop in drops)
    rows = [
        LeftOut(word, drop, max(drop, 0.0) / lost if lost else 0.0, rest)
        for (word, rest), drop in zip(words, drops, strict=True)
    ]
    hint = "" if rows else "the prompt has no words"
    return Table(sorted(rows, key=lambda row: -row.drop), ("word", "drop", "share"), hint)
