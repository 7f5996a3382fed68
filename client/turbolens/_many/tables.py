"""Features as rows of a Parquet table, written part by part and put together at the end.

Beside `out` a folder of parts grows, each a whole Parquet file of the items from one number to another, with the digest
of their prompts. Items come in order, so what is done is always a beginning of the input: a killed run goes on after
its last part. At the end the parts become `out`, in one rename, and go.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from turbolens._blocks import BlockFeatures
from turbolens._files import whole_file
from turbolens._many.arrow import parquet, pyarrow
from turbolens._many.job import check_same
from turbolens._many.prompts import Item

Form = Literal["pooled", "full"]
KEY: Final = b"turbolens"
"""Of the file's metadata: what made it, as JSON."""
_PART_ITEMS: Final = 512
_PART_BYTES: Final = 32 * 2**20
_PART_S: Final = 20.0
"""What a kill costs at most."""
_GROUP_ROWS: Final = 16_384


def schema(form: Form) -> Any:
    """Columns. A list column holds one entry for each active feature; no type is narrower than what readers filter."""
    pa = pyarrow()
    entries: dict[str, Any]
    if form == "pooled":
        entries = {"feature": pa.int32(), "mean": pa.float32(), "max": pa.float32(), "active": pa.float32()}
        more: dict[str, Any] = {}
    else:
        entries = {"position": pa.int32(), "feature": pa.int32(), "activation": pa.float32()}
        more = {"step": pa.int32()}
    return pa.schema(
        {
            "item": pa.int64(), "prompt": pa.string(), "seed": pa.int64(), "sae": pa.string(), **more,
            "height": pa.int32(), "width": pa.int32(), "d_sae": pa.int32(),
            **{name: pa.list_(kind) for name, kind in entries.items()}, "error": pa.string(),
        }
    )  # fmt: skip


def rows(form: Form, block: BlockFeatures) -> Iterator[dict[str, Any]]:
    """A run's features of one SAE: one row of all steps pooled, or one for each step."""
    shape = {"sae": block.sae, "height": block.height, "width": block.width, "d_sae": block.d_sae}
    if form == "pooled":
        yield {**shape, **pool(block)}
        return
    cells = block.height * block.width
    for place, step in enumerate(block.steps):
        own = block.rows // cells == place
        yield {
            **shape, "step": step, "position": (block.rows[own] % cells).astype(np.int32),
            "feature": block.indices[own].astype(np.int32), "activation": block.values[own],
        }  # fmt: skip


def pool(block: BlockFeatures) -> dict[str, Any]:
    """Of each active feature: mean over steps and positions, zeros counted, maximum, and share where it is active."""
    cells = len(block.steps) * block.height * block.width
    order = np.argsort(block.indices, kind="stable")
    values = block.values[order]
    found, starts, counts = np.unique(block.indices[order], return_index=True, return_counts=True)
    total = np.add.reduceat(values.astype(np.float64), starts) if len(found) else np.zeros(0)
    most = np.maximum.reduceat(values, starts) if len(found) else np.zeros(0, np.float32)
    return {
        "feature": found.astype(np.int32), "mean": (total / cells).astype(np.float32), "max": most,
        "active": (counts / cells).astype(np.float32),
    }  # fmt: skip


class Table:
    """The output of one run of many prompts, and what an earlier run left of it."""

    def __init__(self, out: Path, form: Form, job: Mapping[str, Any]) -> None:
        """Look at what is there.

        Raises:
            ValueError: it is of another job; the text says in what.
        """
        self.out, self._job = out, dict(job)
        self._parts = out.with_name(f".{out.name}.parts")
        self._schema = schema(form)
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._digest, self._bytes, self._items, self._failed = hashlib.sha256(), 0, 0, 0
        self._since = time.monotonic()
        self.complete = out.exists()
        self._ranges: list[tuple[int, str]] = []
        """Of each part, its end and the digest of its items."""
        self.done = self.failed = 0
        for file in [out] if self.complete else self._files():
            told = self._told(file)
            check_same(out, told["job"], self._job)
            for end, digest, failed in told["parts"]:
                self._ranges.append((end, digest))
                self.done, self.failed = end, self.failed + failed

    def check(self, item: Item) -> None:
        """Hold an item of the input to what the earlier run had in its place.

        Raises:
            ValueError: it is another one.
        """
        self._digest.update(item.digest())
        end, digest = self._ranges[0]
        if item.number == end - 1:
            if self._digest.hexdigest() != digest:
                raise ValueError(
                    f"{self.out} was begun with other prompts or seeds (before number {end}); pass overwrite=True, or "
                    "another file"
                )
            self._ranges.pop(0)
            self._digest = hashlib.sha256()

    def add(self, item: Item, rows_of: list[dict[str, Any]], error: str | None) -> None:
        """One more item, in order; sooner or later it is on the disk."""
        for row in rows_of or [{"error": error}]:
            full = {"item": item.number, "prompt": item.prompt, **row}
            for name, column in self._columns.items():
                value = full.get(name)
                column.append(value)
                self._bytes += value.nbytes if isinstance(value, np.ndarray) else 8
        self._bytes += len(item.prompt)
        self._digest.update(item.digest())
        self._items += 1
        self._failed += error is not None
        late = time.monotonic() - self._since > _PART_S
        if late or self._items >= _PART_ITEMS or self._bytes >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put on the disk what has come."""
        self._since = time.monotonic()
        if not self._items:
            return
        end = self.done + self._items
        told = {"job": self._job, "parts": [(end, self._digest.hexdigest(), self._failed)]}
        table = pyarrow().table(self._columns, self._schema.with_metadata({KEY: json.dumps(told)}))
        self._parts.mkdir(parents=True, exist_ok=True)
        with whole_file(self._parts / f"{end:012}.parquet") as partial:
            parquet().write_table(table, partial, compression="zstd")
        self.done, self.failed = end, self.failed + self._failed
        self._columns = {name: [] for name in self._schema.names}
        self._digest, self._bytes, self._items, self._failed = hashlib.sha256(), 0, 0, 0

    def finish(self) -> None:
        """Put the parts together; killed on the way, they are all still there."""
        self.flush()
        files = self._files()
        told = {"job": self._job, "parts": [part for file in files for part in self._told(file)["parts"]]}
        whole = self._schema.with_metadata({KEY: json.dumps(told)})
        with whole_file(self.out) as partial, parquet().ParquetWriter(partial, whole, compression="zstd") as writer:
            for group in _groups(files):
                writer.write_table(group.cast(whole))
            writer.close()  # the footer, before the file takes its place
        self.clean()

    def clean(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self._parts.glob("[0-9]*.parquet"))

    def _told(self, file: Path) -> Any:
        metadata = parquet().read_schema(file).metadata or {}
        if KEY not in metadata:
            raise ValueError(
                f"{file} is there and was not written by extract_many; pass overwrite=True, or another file"
            )
        return json.loads(metadata[KEY])


def remove(out: Path) -> None:
    """Forget an output and what was begun of it."""
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_name(f".{out.name}.parts"), ignore_errors=True)


def _groups(files: list[Path]) -> Iterator[Any]:
    """The parts' rows in groups of a good size for readers."""
    waiting: list[Any] = []
    for file in files:
        waiting.append(parquet().read_table(file))
        if sum(t.num_rows for t in waiting) >= _GROUP_ROWS or sum(t.nbytes for t in waiting) >= _PART_BYTES:
            yield pyarrow().concat_tables(waiting)
            waiting = []
    if waiting:
        yield pyarrow().concat_tables(waiting)
