"""Prompts of a Hugging Face dataset, by id or from a local folder, streamed: it is never held in memory as a whole."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from turbolens_training.activations.prompts import PromptError, choose_column, is_held_out

_SHUFFLED: Final = 10_000
"""Prompts that are shuffled at a time."""
_IDENTITY_ROWS: Final = 1_000
"""Rows at the start that say whether it is the same dataset."""


class DatasetPrompts:
    """The distinct prompts of one column of a streamed dataset.

    Chunks asked for in order go on where the last one ended. Any other chunk starts the stream anew and skips, which
    reads all text before it.
    """

    def __init__(self, name: str, dataset: Any, column: str, *, seed: int) -> None:
        """Take a dataset.

        Args:
            name: of the dataset, for messages.
            dataset: a `datasets.IterableDataset`.
            column: where its prompts are.
            seed: of the order.
        """
        self.kind = f"prompts of {Path(name).name}"
        self.summary = f"{name}: prompts streamed from column {column!r}"
        self._name = name
        self._dataset = dataset.select_columns([column])
        self._column = column
        self._seed = seed
        self._streams = {held_out: self._distinct(held_out=held_out) for held_out in (False, True)}
        self._places = {False: 0, True: 0}
        digest = hashlib.sha256()
        for row in self._dataset.take(_IDENTITY_ROWS):
            digest.update(f"{row[column]}\n".encode())
        self.identity = f"dataset:{digest.hexdigest()}"

    def draw(self, index: int, images: int, rng: random.Random, *, held_out: bool) -> list[str]:
        first = index * images
        if first < self._places[held_out]:
            self._streams[held_out] = self._distinct(held_out=held_out)
            self._places[held_out] = 0
        skip = first - self._places[held_out]
        self._places[held_out] = first + images
        return list(itertools.islice(self._streams[held_out], skip, skip + images))

    def _distinct(self, *, held_out: bool) -> Iterator[str]:
        """Its prompts without end, in another order each time it is gone through."""
        for epoch in itertools.count():
            empty = True
            for prompt in shuffled(self._once(held_out=held_out), self._seed, epoch):
                empty = False
                yield prompt
            if empty:
                part = "hold out" if held_out else "train on"
                raise PromptError(f"{self._name}: no prompt to {part}; a hundred distinct ones are enough")

    def _once(self, *, held_out: bool) -> Iterator[str]:
        """Its prompts in the dataset's own order."""
        seen: set[bytes] = set()  # hashes: of millions of prompts, the text itself would not fit
        for row in self._dataset:
            prompt = row[self._column]
            if prompt is not None and not isinstance(prompt, str):
                raise PromptError(f"{self._name}: {self._column!r} holds {type(prompt).__name__}, expected text")
            text = (prompt or "").strip()
            key = hashlib.sha256(text.encode()).digest()[:8]
            if text and key not in seen and is_held_out(text) == held_out:
                seen.add(key)
                yield text


def shuffled(items: Iterable[str], seed: int, epoch: int) -> Iterator[str]:
    """Items in an order of the seed's and epoch's, none of them long before its turn; `_SHUFFLED` are held."""
    rng = random.Random(f"{seed}/{epoch}")
    held: list[str] = []
    for item in items:
        if len(held) < _SHUFFLED:
            held.append(item)
        else:
            place = rng.randrange(_SHUFFLED)
            yield held[place]
            held[place] = item
    rng.shuffle(held)
    yield from held


def open_dataset(name: str, column: str | None, *, seed: int) -> DatasetPrompts:
    """Open a dataset's training split, or its only one.

    Args:
        name: a folder, as files or as `Dataset.save_to_disk` writes it, or an id like owner/name.
        column: where its prompts are; None: the only one with text.
        seed: of the order.

    Raises:
        PromptError: `datasets` is not installed, or the dataset cannot be opened or read.
    """
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"--prompts {name}: a dataset needs the `datasets` package; pip install 'turbolens[datasets]'"
        ) from error
    folder = Path(name).expanduser()
    saved = any((folder / file).exists() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            opened = datasets.load_from_disk(str(folder))
        else:
            opened = datasets.load_dataset(str(folder) if folder.is_dir() else name, streaming=True)
        splits = dict(opened) if isinstance(opened, dict) else {"train": opened}
        split = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1 and split != "train":
            raise PromptError(f"--prompts {name}: no split 'train' among {', '.join(splits)}")
        dataset = splits[split].to_iterable_dataset() if saved else splits[split]
        first: dict[str, Any] = next(iter(dataset), {})
        texts = [key for key, value in first.items() if isinstance(value, str)]
        return DatasetPrompts(name, dataset, choose_column(name, texts, column), seed=seed)
    except PromptError:
        raise
    except Exception as error:  # offline, gated, missing, malformed: `datasets` raises many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"--prompts {name}: the dataset cannot be opened ({why}); offline, give a local file or folder"
        ) from error
