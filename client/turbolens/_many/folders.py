"""Pictures in a folder: whole files, a journal of what is done, and at the end `metadata.jsonl`, a line a picture.

The journal has a line for each item in order, written once its pictures are on the disk. A line that was cut off is
forgotten, and its pictures are made and written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from turbolens._files import write_whole
from turbolens._many.job import check_same
from turbolens._many.prompts import Item
from turbolens._results import Picture

_JOURNAL: Final = ".turbolens.jsonl"
_METADATA: Final = "metadata.jsonl"
_FAILED: Final = "failed.jsonl"
_ENDINGS: Final = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


class Folder:
    """The output of one run of many prompts, and what an earlier run left of it."""

    def __init__(self, out: Path, job: Mapping[str, Any], kind: str) -> None:
        """Look at what is there.

        Raises:
            ValueError: it is of another job, or is no folder of ours, or there is no such file.
        """
        if kind not in _ENDINGS:
            raise ValueError(f"format {kind!r}: files are {', '.join(_ENDINGS)}")
        self.out, self._ending, self._journal = out, _ENDINGS[kind], out / _JOURNAL
        self._digests: list[str] = []
        self.failed = 0
        if not self._journal.exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ValueError(f"{out} is there and was not written by generate_many; give another folder")
            out.mkdir(parents=True, exist_ok=True)
            write_whole(self._journal, f"{json.dumps({'job': job})}\n".encode())
        else:
            first, *lines = read_journal(self._journal)
            check_same(out, first["job"], job)
            self._digests = [line["digest"] for line in lines]
            self.failed = sum(line["error"] is not None for line in lines)
        self.done = len(self._digests)

    def check(self, item: Item) -> None:
        """Hold an item of the input to what the earlier run had in its place.

        Raises:
            ValueError: it is another one.
        """
        if item.digest().hex() != self._digests[item.number]:
            raise ValueError(
                f"{self.out} was begun with another prompt or seed (number {item.number}); pass overwrite=True, or "
                "another folder"
            )

    def add(self, item: Item, pictures: Sequence[Picture], error: str | None) -> None:
        """One more item, in order; on the disk when this returns."""
        names = [f"{item.number:06}-{picture.seed}{self._ending}" for picture in pictures]
        for name, picture in zip(names, pictures, strict=True):
            write_whole(self.out / name, picture.coded_as(self._ending))
        told = {
            "item": item.number, "digest": item.digest().hex(), "prompt": item.prompt, "error": error,
            "pictures": [[name, picture.seed] for name, picture in zip(names, pictures, strict=True)],
        }  # fmt: skip
        with self._journal.open("ab") as file:
            file.write(f"{json.dumps(told)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.done += 1

    def finish(self) -> None:
        """Write the list of pictures; failed prompts go to a list of their own."""
        _, *lines = read_journal(self._journal)
        made = [
            {"file_name": name, "item": line["item"], "prompt": line["prompt"], "seed": seed}
            for line in lines
            for name, seed in line["pictures"]
        ]
        bad = [{key: line[key] for key in ("item", "prompt", "error")} for line in lines if line["error"] is not None]
        write_whole(self.out / _METADATA, _jsonl(made))
        if bad:
            write_whole(self.out / _FAILED, _jsonl(bad))


def read_journal(journal: Path) -> list[Any]:
    """A journal's lines; one that was cut off goes."""
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(journal, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def remove(out: Path) -> None:
    """Forget an output, where it is one of ours; files of others stay.

    Raises:
        ValueError: it is a folder of others.
    """
    if (out / _JOURNAL).exists():
        for line in read_journal(out / _JOURNAL)[1:]:
            for name, _ in line["pictures"]:
                (out / name).unlink(missing_ok=True)
        for name in (_METADATA, _FAILED, _JOURNAL):
            (out / name).unlink(missing_ok=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and was not written by generate_many; give another folder")


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
