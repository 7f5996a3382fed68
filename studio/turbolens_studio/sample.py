"""A sample of runs, looked at once: how strong each feature fires, and with which others.

The pictures are the catalogue's own examples, a few of each SAE, so that every kind of thing is among them.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import turbolens as tl
from turbolens_studio.connection import Connection
from turbolens_studio.features import Atlas, brief

RUNS: Final = 64
BINS: Final = 24
_AT_ONCE: Final = 2


class Sample:
    """Activations of a sample of runs; measured in the background when it is first asked for."""

    def __init__(self, connection: Connection, atlas: Atlas) -> None:
        self._connection = connection
        self._atlas = atlas
        self._generation = -1
        self._task: asyncio.Task[None] | None = None
        self._done = 0
        self._of = 0
        self._cells: dict[str, list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]]] = {}
        """By SAE: (cell, feature, activation) of each run, cells of one run numbered by themselves."""
        self._grids: dict[str, int] = {}

    async def of(self, ref: tl.FeatureRef, count: int = 8) -> dict[str, Any]:
        """What the sample says of one feature; how far it is, where it is being measured."""
        if self._generation != self._connection.generation:
            if self._task is not None:
                self._task.cancel()
            self._generation, self._done, self._cells = self._connection.generation, 0, {}
            self._task = asyncio.create_task(self._measure())
        if self._task is not None and not self._task.done():
            return {"state": "measuring", "done": self._done, "of": self._of}
        if self._task is not None and (error := self._task.exception()) is not None:
            self._generation = -1  # the next one who asks tries again
            raise error
        if ref.sae not in self._cells:
            return {"state": "none"}
        return {"state": "measured", "runs": self._done, **await self._told(ref, count)}

    async def _measure(self) -> None:
        lens = self._connection.lens
        runs = await self._runs()
        self._of = len(runs)
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(example: tl.Example) -> None:
            async with room:
                found = await lens.extract(example.prompt, seed=example.seed, steps=example.steps, float32=True)
            for sae, block in found.items():
                self._cells.setdefault(sae, []).append((block.rows, block.indices, block.values))
                self._grids[sae] = block.height * block.width * len(block.steps)
            self._done += 1

        await asyncio.gather(*map(one, runs))

    async def _runs(self) -> list[tl.Example]:
        saes = [sae.name for sae in self._connection.model.saes]
        chosen: dict[tuple[str, int, int], tl.Example] = {}
        draw = np.random.default_rng(0)
        for sae in saes:
            rows = [feature for feature in await self._atlas.rows(sae) if feature.frequency > 0]
            for at in draw.permutation(len(rows))[: RUNS // len(saes)]:
                known = await self._connection.lens.get_feature(rows[at])
                if known.examples:
                    example = known.examples[int(draw.integers(len(known.examples)))]
                    chosen[example.prompt, example.seed, example.steps] = example
        # Runs of one number of steps, so that a cell means the same in all of them.
        return [example for example in chosen.values() if example.steps == 1] or list(chosen.values())

    async def _told(self, ref: tl.FeatureRef, count: int) -> dict[str, Any]:
        runs = self._cells[ref.sae]
        own = np.concatenate([values[indices == ref.index] for _, indices, values in runs])
        cells = self._grids[ref.sae] * len(runs)
        counts, edges = np.histogram(own, BINS, (0, float(own.max()))) if len(own) else (np.zeros(BINS), np.zeros(1))
        rows = await self._atlas.rows(ref.sae)
        together = [
            brief(rows[index]) | {"together": score}
            for index, score in together_with(runs, ref.index, len(rows))[:count]
        ]
        return {
            "cells": cells,
            "active": len(own),
            "counts": counts.tolist(),
            "top": float(edges[-1]),
            "together": together,
        }


def together_with(
    runs: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]], index: int, d_sae: int
) -> list[tuple[int, float]]:
    """Other features by how often they fire in the same cell: cells of both over cells of either (Jaccard)."""
    both, every, own = np.zeros(d_sae), np.zeros(d_sae), 0
    for rows, indices, _ in runs:
        every += np.bincount(indices, minlength=d_sae)
        at = rows[indices == index]
        own += len(at)
        both += np.bincount(indices[np.isin(rows, at)], minlength=d_sae)
    either = every + own - both
    score = np.divide(both, either, out=np.zeros(d_sae), where=either > 0)
    score[index] = 0
    return [(int(i), float(score[i])) for i in np.argsort(-score, kind="stable") if score[i] > 0]
