"""Where prompts come from: the scene grammar, a file, or a dataset.

A source gives the prompts of a chunk by the chunk's index, the same every time, so that a run goes on anywhere from
one number. Files and datasets are shuffled by the seed, gone through again in another order when they end, and cut
in a held-out part and the rest by the prompts' own hashes: equal prompts are always on the same side.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turbolens_training.activations.places import PromptError
from turbolens_training.activations.prompt_files import Column
from turbolens_training.mini.captions import describe
from turbolens_training.mini.scenes import decode_scenes, sample_codes

HELD_OUT_ONE_IN: Final = 20
"""One of so many distinct prompts of a file or dataset is held out."""


class PromptSource(Protocol):
    """The prompts of a chunk, by its index."""

    summary: str
    """What was read, in a line for the reader; empty where nothing was."""
    identity: str
    """Of the prompts and their order, as far as the seed does not say it; empty for the scene grammar."""
    kind: str
    """What it is, in words, for the provenance of what is trained on it."""

    def draw(self, index: int, images: int, rng: random.Random, *, held_out: bool) -> list[str]:
        """The prompts of chunk `index`, `images` of them.

        Args:
            index: of the chunk.
            images: prompts of a chunk.
            rng: the chunk's own.
            held_out: draw from what is never trained on.
        """
        ...


class ScenePrompts:
    """Random captions of random scenes, without end."""

    identity = ""
    summary = ""
    kind = "captioned procedural scenes"

    def __init__(self, *, complete: bool = False) -> None:
        """`complete`: captions name every value of their scene."""
        self._complete = complete

    def codes(self, images: int, rng: random.Random) -> Tensor:
        """The scenes that `draw` describes when it is given a generator in the same state, [N, CODE_DIM]."""
        return sample_codes(images, torch.Generator().manual_seed(rng.getrandbits(62)))

    def draw(self, index: int, images: int, rng: random.Random, *, held_out: bool) -> list[str]:
        scenes = decode_scenes(self.codes(images, rng))
        return [describe(scene, rng, complete=self._complete) for scene in scenes]


class Distinct:
    """Prompts that say something, each the first time that it comes; what is left out is counted on the way."""

    def __init__(self, read: Iterable[str | None]) -> None:
        """`read`: prompts as they stand; None where there is none."""
        self._read = read
        self._all = hashlib.sha256()
        self._seen: set[bytes] = set()  # hashes: of millions of prompts, the text itself would not fit
        self._count = self._null = self._empty = 0

    def __iter__(self) -> Iterator[str]:
        for prompt in self._read:
            text = (prompt or "").strip()
            self._count += 1
            self._null += prompt is None
            self._empty += not text
            digest = hashlib.sha256(text.encode()).digest()
            if text and digest not in self._seen:
                self._seen.add(digest)
                self._all.update(digest)
                yield text

    def __len__(self) -> int:
        """Prompts so far."""
        return len(self._seen)

    @property
    def identity(self) -> str:
        """A hash of every prompt so far, in order."""
        return self._all.hexdigest()

    @property
    def left_out(self) -> str:
        """In words, of what was read so far."""
        null = f" ({self._null:,} null)" if self._null else ""
        doubled = self._count - self._empty - len(self)
        return f"{self._empty:,} empty{null}, {doubled:,} doubled"


class PromptList:
    """The distinct prompts of a file, all in memory."""

    def __init__(self, column: Column, *, seed: int) -> None:
        """Take in the prompts of a file.

        Args:
            column: its prompts; those that are empty, or were read before, are left out and counted.
            seed: of the order.

        Raises:
            PromptError: there are too few prompts to train on some and hold others out.
        """
        self.kind = column.kind
        self._seed = seed
        self._parts: dict[bool, list[str]] = {True: [], False: []}
        distinct = Distinct(column.rows)
        for prompt in distinct:
            self._parts[is_held_out(prompt)].append(prompt)
        self.identity = f"prompts:{distinct.identity}"
        self.summary = summarize(column.name, distinct, len(self._parts[True]))

    def draw(self, index: int, images: int, rng: random.Random, *, held_out: bool) -> list[str]:
        part = self._parts[held_out]
        places = (divmod(row, len(part)) for row in range(index * images, (index + 1) * images))
        return [part[_order(self._seed, epoch, len(part))[place]] for epoch, place in places]


def summarize(name: str, distinct: Distinct, held_out: int) -> str:
    """What was read, in a line.

    Raises:
        PromptError: there are too few prompts to train on some and hold others out.
    """
    if not 0 < held_out < len(distinct):
        raise PromptError(
            f"{name}: {len(distinct)} distinct prompts are too few to hold out one in {HELD_OUT_ONE_IN}; "
            f"a hundred are enough; left out: {distinct.left_out}"
        )
    return f"{name}: {len(distinct):,} prompts, {held_out:,} of them held out; left out: {distinct.left_out}"


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept out of training, by its hash alone."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of `count` prompts when they are gone through for the `epoch`-th time."""
    return np.random.default_rng([seed, epoch]).permutation(count)
