"""A shuffling reservoir: a batch drawn from it spans thousands of pictures, though the stream comes in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Reservoir:
    """A fixed number of tokens, of which each new one replaces a random old one."""

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros(capacity, width, device=device)
        self._filled = 0

    @property
    def full(self) -> bool:
        return self._filled == len(self._rows)

    @property
    def rows(self) -> Tensor:
        """What it holds, [filled, width]."""
        return self._rows[: self._filled]

    def put(self, tokens: Tensor, generator: torch.Generator) -> None:
        """Take in tokens [n, width]: into free slots first, then into random ones."""
        free = min(len(tokens), len(self._rows) - self._filled)
        self._rows[self._filled : self._filled + free] = tokens[:free]
        self._filled += free
        rest = tokens[free:]
        # Slots of one call are distinct: with doubles, which token of two stays would depend on the device.
        slots = torch.randperm(len(self._rows), generator=generator)[: len(rest)].to(self._rows.device)
        self._rows[slots] = rest[: len(slots)]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """A batch [n, width], with replacement."""
        picks = torch.randint(self._filled, (n,), generator=generator).to(self._rows.device)
        return self._rows[picks]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "filled": self._filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.copy_(state["rows"])
        self._filled = state["filled"]
