"""What runs a model at the moment: its text encoders, U-Net and decoder, which may be exchanged between two batches."""

from __future__ import annotations

import dataclasses
from typing import Any

from turbolens_server.engine.text import Encode
from turbolens_server.kernels.select import Pick
from turbolens_server.unet.backend import UNetBackend


@dataclasses.dataclass(frozen=True)
class Running:
    """What runs a batch, the same from its first step to its pictures."""

    unet: UNetBackend
    decoder: Any
    """Decodes pictures: the VAE, its recording on a GPU, or its compiled decoder."""
    reason: str
    """Why it is these."""
    text: Encode | None = None
    """Encodes prompts; None: the encoders themselves, or their recording on a GPU."""
    pick: Pick | None = None
    """Selects features on a CPU; None: NumPy."""


class Seat:
    """Where engines of one model find what runs it."""

    def __init__(self, running: Running) -> None:
        self.running = running
