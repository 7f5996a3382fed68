"""Prompts of a Hugging Face dataset, by id or from a local folder, streamed: it is never held in memory as a whole."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from turbolens_server.files import first_line
from turbolens_training.activations.places import PromptError
from turbolens_training.activations.prompt_files import TEXT, Column, check_text, choose_column, kinds_of
from turbolens_training.activations.prompts import Distinct, is_held_out, summarize

_SHUFFLED: Final = 10_000
"""Prompts that are shuffled at a time."""
_MARKS: Final = ";\t|"
"""In the name of a lone column they say that a table with other separators than commas was taken as lines."""


class DatasetPrompts:
    """The distinct prompts of one column of a streamed dataset.

    It is read once as a whole before the first draw, which says what it is and what is left out: a dataset is known by
    all of its rows. Chunks asked for in order go on where the last one ended. Any other chunk starts the stream anew
    and skips, which reads all text before it.
    """

    def __init__(self, column: Column, *, seed: int) -> None:
        """Take a dataset.

        Args:
            column: its prompts, which can be gone through again and again.
            seed: of the order.

        Raises:
            PromptError: it cannot be read, or has too few prompts to train on some and hold others out.
        """
        self._column = column
        self._seed = seed
        distinct = Distinct(tqdm(column.rows, desc=f"reading {column.name}", unit=" rows", unit_scale=True))
        held_out = sum(map(is_held_out, distinct))
        self.kind = column.kind
        self.summary = summarize(column.name, distinct, held_out)
        self.identity = f"dataset:{distinct.identity}"
        self._streams = {held_out: self._distinct(held_out=held_out) for held_out in (False, True)}
        self._places = {False: 0, True: 0}

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
            part = (p for p in self._column.rows if p is not None and is_held_out(p.strip()) == held_out)
            yield from shuffled(Distinct(part), self._seed, epoch)


class _Rows:
    """The rows of a dataset's column, as often as they are gone through."""

    def __init__(self, name: str, dataset: Any, column: str) -> None:
        self._name, self._dataset, self._column = name, dataset.select_columns([column]), column

    def __iter__(self) -> Iterator[str | None]:
        for number, row in enumerate(_guarded(self._name, self._dataset), 1):
            yield check_text(row[self._column], f"{self._name}, row {number}: {self._column!r}")


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
    """Open a dataset's training split, or its only one, for training.

    Raises:
        PromptError: as for :func:`dataset_column`, or there are too few prompts.
    """
    return DatasetPrompts(dataset_column(name, column), seed=seed)


def dataset_column(name: str, column: str | None) -> Column:
    """The prompts of a dataset's training split, or of its only one; they can be gone through again and again.

    Args:
        name: a folder, as files or as `Dataset.save_to_disk` writes it, or an id like owner/name.
        column: where its prompts are; None: the only one with text, for which all rows are read where the dataset
            does not say what its columns are.

    Raises:
        PromptError: `datasets` is not installed, or the dataset cannot be opened or read.
    """
    dataset = _open(name)
    told = dataset.features
    if told is not None:
        columns = {other: _kind(feature) for other, feature in told.items()}
    else:
        columns = kinds_of(_guarded(name, dataset))
    chosen = choose_column(name, columns, column)
    if column is None and any(mark in chosen for mark in _MARKS):
        raise PromptError(f"{name}: its only column is called {chosen!r}; separate its columns by commas")
    return Column(name, chosen, _Rows(name, _open(name, chosen), chosen))


def _open(name: str, column: str | None = None) -> Any:
    """The split to read; of CSV files one column alone, in which words such as "NA" and "null" are words."""
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
            place = str(folder) if folder.is_dir() else name
            words: dict[str, Any] = {}
            if column is not None and hasattr(datasets.load_dataset_builder(place).config, "keep_default_na"):
                words = {"usecols": [column], "keep_default_na": False, "na_values": [""]}
            opened = datasets.load_dataset(place, streaming=True, **words)
    except Exception as error:  # offline, gated, missing, malformed: `datasets` raises many kinds
        raise PromptError(
            f"--prompts {name}: the dataset cannot be opened ({first_line(error)}); offline, give a local file or "
            "folder"
        ) from error
    splits = dict(opened) if isinstance(opened, dict) else {"train": opened}
    split = "train" if "train" in splits else next(iter(splits))
    if len(splits) > 1 and split != "train":
        raise PromptError(f"--prompts {name}: no split 'train' among {', '.join(splits)}")
    return splits[split].to_iterable_dataset() if saved else splits[split]


def _guarded(name: str, dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, of which any may turn out to be malformed."""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # `datasets` raises many kinds
            raise PromptError(f"{name}: the dataset cannot be read ({first_line(error)})") from error
        yield row


def _kind(feature: Any) -> str:
    """Of a dataset's column."""
    type_ = str(getattr(feature, "dtype", None) or feature)
    return TEXT if type_ in ("string", "large_string") else type_
