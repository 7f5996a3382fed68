"""Colours for heat-maps: dark blue through green to yellow, evenly rising in lightness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

_ANCHORS: Final = np.array([(10, 12, 60), (40, 70, 140), (30, 130, 130), (90, 185, 90), (250, 230, 60)], np.float32)


def colorize(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Values [height, width] in [0, 1] as colours [height, width, 3]."""
    at = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, at, _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay(heat: npt.NDArray[np.float32], picture: Image.Image, opacity: float = 0.75) -> Image.Image:
    """A heat-map [rows, columns] over a picture: the hotter, the more it covers. Scaled by its own maximum."""
    from PIL import Image

    scaled = heat / max(float(heat.max(initial=0.0)), 1e-9)
    colors = Image.fromarray(colorize(scaled)).resize(picture.size, Image.Resampling.NEAREST)
    cover = Image.fromarray((scaled * opacity * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(colors, picture.convert("RGB"), cover)
