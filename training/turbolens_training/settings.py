"""What the settings of several commands have in common: checked before any work, and told of in words or in JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Telling:
    """A command that says what came of it."""

    json: bool = dataclasses.field(default=False, kw_only=True)
    """Print JSON: a line for each thing told."""

    def tell(self, line: object, **told: Any) -> None:
        """Print for people or for programs, as asked."""
        print(json.dumps(told, default=str) if self.json else line, flush=True)


def refuse(problems: Iterable[str]) -> None:
    """Raise ValueError with all that is wrong with the settings of a command, where anything is."""
    if found := list(problems):
        raise ValueError("; ".join(found))


def counts_below_one(settings: object, *names: str) -> Iterator[str]:
    """Which counts are below 1, alone or in a tuple; None is none."""
    for name in names:
        value = getattr(settings, name)
        counts = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(count < 1 for count in counts):
            yield f"{name}={value}, expected at least 1"
