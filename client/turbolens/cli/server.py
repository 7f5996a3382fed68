"""What every command that calls a server has in common."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import turbolens as tl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """A command that calls a server."""

    server: str = "localhost:50051"
    """`host:port` of a server, or `embedded` for one in this process."""
    json: bool = False
    """Print JSON."""

    def connect(self, **options: Any) -> tl.Lens:
        """A connection to it."""
        return tl.connect(self.server, **options)

    def show(self, value: Any, text: object) -> None:
        """Print for programs or for people, as asked."""
        print(json.dumps(value, indent=1, default=str) if self.json else text)


def rows_of(table: tl.Table) -> list[dict[str, Any]]:
    """A table's rows for programs."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.values()]


def pairs(option: str, texts: Sequence[str], form: str) -> list[tuple[str, str]]:
    """The two sides of a flag that is said as NAME=VALUE."""
    found = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, found, strict=True):
        if not equals or not name:
            raise ValueError(f"--{option} {text}: write {form}")
    return [(name, value) for name, _, value in found]


def numbers(option: str, texts: Sequence[str], of: str) -> dict[str, int]:
    """The numbers of a flag that is said of each SAE or reference."""
    found = pairs(option, texts, f"{of}=NUMBER")
    for name, number in found:
        if not number.isdecimal():
            raise ValueError(f"--{option} {name}={number}: write {of}=NUMBER")
    return {name: int(number) for name, number in found}
