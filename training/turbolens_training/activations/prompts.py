"""Where prompts come from: the scene grammar, a file, or a dataset.

A source gives the prompts of a chunk by the chunk's index, the same every time, so that a run goes on anywhere from
one number. Files and datasets are shuffled by the seed, gone through again in another order when they end, and cut
in a held-out part and the rest by the prompts' own hashes: equal prompts are always on the same side.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from turbolens_training.mini.captions import describe
from turbolens_training.mini.scenes import decode_scenes, sample_codes

SCENES: Final = "scenes"
"""The name of the scene grammar where a file of prompts could stand."""
HELD_OUT_ONE_IN: Final = 20
"""One of so many distinct prompts of a file or dataset is held out."""


class PromptError(ValueError):
    """Prompts cannot be read; the text is one line that names the file and, where there is one, the line."""


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


class PromptList:
    """The distinct prompts of a file, all in memory."""

    def __init__(self, name: str, read: Iterable[str | None], *, seed: int) -> None:
        """Take in the prompts of a file.

        Args:
            name: of the file, for messages.
            read: prompts as they stand; those that are empty, or were read before, are left out and counted.
            seed: of the order.

        Raises:
            PromptError: there are too few prompts to train on some and hold others out.
        """
        self.kind = f"prompts of {Path(name).name}"
        self._seed = seed
        count, empty = 0, 0
        distinct: dict[str, None] = {}
        for prompt in read:
            text = (prompt or "").strip()
            count += 1
            if text:
                distinct[text] = None
            else:
                empty += 1
        self._parts: dict[bool, list[str]] = {True: [], False: []}
        digest = hashlib.sha256()
        for prompt in distinct:
            self._parts[is_held_out(prompt)].append(prompt)
            digest.update(prompt.encode() + b"\n")
        self.identity = f"prompts:{digest.hexdigest()}"
        self.summary = (
            f"{name}: {len(distinct):,} prompts, {len(self._parts[True]):,} of them held out; "
            f"left out: {empty:,} empty, {count - empty - len(distinct):,} doubled"
        )
        if not all(self._parts.values()):
            raise PromptError(
                f"{name}: {len(distinct)} distinct prompts are too few to hold out one in {HELD_OUT_ONE_IN}; "
                "a hundred are enough"
            )

    def draw(self, index: int, images: int, rng: random.Random, *, held_out: bool) -> list[str]:
        part = self._parts[held_out]
        places = (divmod(row, len(part)) for row in range(index * images, (index + 1) * images))
        return [part[_order(self._seed, epoch, len(part))[place]] for epoch, place in places]


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept out of training, by its hash alone."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of `count` prompts when they are gone through for the `epoch`-th time."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def open_prompts(spec: str, *, seed: int) -> PromptSource:
    """The source that `--prompts` names.

    Args:
        spec: "scenes"; FILE (.txt, a prompt a line); FILE[:COLUMN] (.parquet, .csv, .jsonl); or FOLDER[:COLUMN] or
            OWNER/NAME[:COLUMN], a dataset read by Hugging Face `datasets`. Without a column, the only one with text.
        seed: of the order.

    Raises:
        PromptError: there is no such thing, or it cannot be read.
    """
    if spec == SCENES:
        return ScenePrompts()
    name, column = _split_column(spec)
    path = Path(name).expanduser()
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise PromptError(f"--prompts {spec}: {path.suffix or 'no suffix'}: not one of {', '.join(_READERS)}")
        return PromptList(name, reader(path, column), seed=seed)
    is_id = name.count("/") == 1 and not path.is_absolute() and not name.startswith((".", "~"))
    if not path.is_dir() and not is_id:
        raise PromptError(
            f"--prompts {spec}: no such file or folder, not {SCENES!r}, and not a dataset's id like owner/name"
        )
    from turbolens_training.activations.dataset_prompts import open_dataset

    return open_dataset(name, column, seed=seed)


def _split_column(spec: str) -> tuple[str, str | None]:
    """ "captions.csv:text" -> ("captions.csv", "text"); a name that exists as it stands has no column."""
    name, colon, column = spec.rpartition(":")
    if not colon or Path(spec).expanduser().exists():
        return spec, None
    return name, column


def choose_column(name: str, columns: Iterable[str], column: str | None) -> str:
    """The column to read: the one asked for, or the only one.

    Args:
        name: of the file, for messages.
        columns: those that hold text.
        column: the one asked for.

    Raises:
        PromptError: it is not there, or none was asked for and there is more or less than one.
    """
    found = list(columns)
    if column is None and len(found) == 1:
        return found[0]
    if column not in found:
        wanted = "say which column" if column is None else f"no column {column!r} with text"
        raise PromptError(f"{name}: {wanted}, as {Path(name).name}:COLUMN; it has {', '.join(found) or 'none'}")
    return column


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line.

    Raises:
        PromptError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PromptError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error


def _read_text(path: Path, column: str | None) -> Iterator[str]:
    if column is not None:
        raise PromptError(f"{path}: a text file has no columns; leave out :{column}")
    return (line for _, line in _lines(path))


def _read_csv(path: Path, column: str | None) -> Iterator[str | None]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        place = header.index(choose_column(str(path), header, column))
        for row in reader:
            if row and len(row) != len(header):
                raise PromptError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}")
            yield row[place] if row else None
    except csv.Error as error:
        raise PromptError(f"{path}, line {reader.line_num}: {error}") from error


def _read_jsonl(path: Path, column: str | None) -> Iterator[str | None]:
    for number, line in _lines(path):
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise PromptError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        column = column or choose_column(str(path), [key for key, value in row.items() if isinstance(value, str)], None)
        prompt = row.get(column)
        if prompt is not None and not isinstance(prompt, str):
            raise PromptError(f"{path}, line {number}: {column!r} is {type(prompt).__name__}, expected text")
        if column not in row:
            raise PromptError(f"{path}, line {number}: no {column!r}; it has {', '.join(row) or 'nothing'}")
        yield prompt


def _read_parquet(path: Path, column: str | None) -> Iterator[str | None]:
    try:
        with pq.ParquetFile(path) as file:
            texts = [
                f.name for f in file.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
            ]
            chosen = choose_column(str(path), texts, column)
            for batch in file.iter_batches(columns=[chosen]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


_READERS: Final[dict[str, Callable[[Path, str | None], Iterator[str | None]]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
