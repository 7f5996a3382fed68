"""What serving needs to know of a model, and how it gets at the model's modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from turbolens_server.engine.modules import Modules
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.lora import Fused
from turbolens_server.loading.memory import Counted
from turbolens_server.unet.points import HookPoint


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be served."""

    hash: str
    """Of the U-Net's weights."""
    components_hash: str
    """Of all else that draws."""
    fused: Fused
    unet: Mapping[str, Any]
    """The U-Net's configuration."""
    vae: Any
    """The VAE's, its settings as attributes."""
    points: Mapping[str, HookPoint]
    """Every hook point, in order of execution."""
    downscale: int
    """Picture pixels for each pixel of a latent, each way."""
    tokenizers: tuple[Any, Any]
    zeros_for_nothing: bool
    """No text is zeros, and not the empty text."""
    scheduler: Any
    """The model's own."""
    modules: Modules
    count: Callable[..., Counted]
    """What its modules take; arguments as for :func:`turbolens_server.loading.memory.count`."""

    @property
    def embeds_guidance(self) -> bool:
        """Whether the U-Net takes its guidance as an embedding."""
        return self.unet["time_cond_proj_dim"] is not None

    def edge(self, size: int | None) -> int:
        """A picture's edge: the model's own, or one that the U-Net can halve as often as it does.

        Raises:
            LoadError: it cannot, or the exported graph would not take it.
        """
        if size is None:
            own = self.unet["sample_size"]
            own = own[0] if isinstance(own, list | tuple) and len({*own}) == 1 else own
            if not isinstance(own, int):
                raise LoadError(f"the U-Net says sample_size={own!r}, and pictures are square; give --size in pixels")
            return own * self.downscale
        if size % self._cell or size < 2 * self._cell:
            raise LoadError(f"--size {size}: must be a multiple of {self._cell}, from {2 * self._cell}")
        return size

    def size(self, text: str) -> tuple[int, int]:
        """A further size, (height, width), of "WIDTHxHEIGHT"; raises as `edge`."""
        width, _, height = text.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise LoadError(f"--more-sizes {text}: write WIDTHxHEIGHT, such as 640x384")
        found = int(height), int(width)
        if any(edge % self._cell or edge < 2 * self._cell for edge in found):
            raise LoadError(f"--more-sizes {text}: must be multiples of {self._cell}, from {2 * self._cell}")
        return found

    @property
    def _cell(self) -> int:
        """What the U-Net can halve as often as it does."""
        return int(self.downscale * 2 ** (len(self.unet["block_out_channels"]) - 1))
