"""The parts of a model that are Python modules, read when something first asks for them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Read:
    """They, on their device."""

    unet: Any
    """As `diffusers` made it, and likewise the VAE."""
    vae: Any
    encoders: tuple[Any, Any]
    """Of text, as `transformers` made them."""


class Modules:
    """A model's U-Net, VAE and text encoders.

    Where compiled code runs a model, a server may never need them, and to import what they are made of takes longer
    than all else at a start.
    """

    def __init__(self, read: Callable[[], Read]) -> None:
        """`read` is called once, by whichever thread is first to ask."""
        self._read = read
        self._lock = threading.Lock()
        self._found: Read | None = None

    @property
    def are_read(self) -> bool:
        """Whether they are there."""
        return self._found is not None

    def get(self) -> Read:
        """Them; read now where nobody has asked before."""
        with self._lock:
            if self._found is None:
                self._found = self._read()
            return self._found
