"""Prompts from lists, iterables and files, one at a time."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Final

from turbolens._many.arrow import parquet
from turbolens._numbers import whole

Prompts = str | Path | Iterable[str | Mapping[str, Any]]
"""A file (.txt, .jsonl, .csv, .parquet), or prompts: texts, or mappings with a prompt and perhaps a seed."""
_ENDINGS: Final = (".txt", ".jsonl", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One prompt and the seeds it is run with."""

    number: int
    prompt: str
    seeds: tuple[int, ...]

    def digest(self) -> bytes:
        """What tells it from another."""
        return hashlib.sha256(json.dumps([self.prompt, self.seeds]).encode()).digest()


def count(prompts: Prompts) -> int | None:
    """How many there are, where that is known without reading them."""
    return len(prompts) if isinstance(prompts, Sized) and not isinstance(prompts, str) else None


def items(prompts: Prompts, seeds: Sequence[int], column: str) -> Iterator[Item]:
    """Every item in order.

    Args:
        prompts: where they are; a row's own `seed` goes before `seeds`.
        seeds: of every prompt.
        column: of rows, the one that is the prompt.

    Raises:
        ValueError: a file has another ending, or a row no prompt; it names the row.
    """
    rows = _file(Path(prompts)) if isinstance(prompts, str | Path) else iter(prompts)
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield Item(number, row, tuple(seeds))
            continue
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            has = f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is {row!r:.60}"
            raise ValueError(f"prompt {number}: no text {column!r}; {has}")
        own = row.get("seed")
        yield Item(number, row[column], tuple(seeds) if own in (None, "") else (_seed(own, number),))


def _seed(value: Any, number: int) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return whole(value, f"the seed of prompt {number}")


def _file(path: Path) -> Iterator[Any]:
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise ValueError(f"{path}: prompts are read from {', '.join(_ENDINGS)}")
    if ending == ".parquet":
        with parquet().ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8-sig", newline="" if ending == ".csv" else None) as lines:
        if ending == ".csv":
            yield from csv.DictReader(lines)
        elif ending == ".txt":
            yield from (line.rstrip("\n") for line in lines)
        else:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
