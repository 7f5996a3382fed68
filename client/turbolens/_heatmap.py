"""Colours for heat-maps: dark blue through green to yellow, evenly rising in lightness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

_STRIP: Final = 16
"""Pixels of the strip with the scale."""
_ANCHORS: Final = np.array([(10, 12, 60), (40, 70, 140), (30, 130, 130), (90, 185, 90), (250, 230, 60)], np.float32)


def colorize(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Values [height, width] in [0, 1] as colours [height, width, 3]."""
    at = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, at, _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay(
    heat: npt.NDArray[np.float32],
    picture: Image.Image,
    opacity: float = 0.75,
    *,
    smooth: bool = True,
    scale: bool = False,
) -> Image.Image:
    """A heat-map [rows, columns] over a picture: the hotter, the more it covers. Coloured up to its own maximum.

    Args:
        heat: not negative.
        picture: what it lies on.
        opacity: of the hottest place.
        smooth: between cells; False: the cells as they are.
        scale: add a strip below that says what the colours are.
    """
    from PIL import Image

    most = float(heat.max(initial=0.0))
    way = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    large = Image.fromarray((heat / max(most, 1e-9)).astype(np.float32)).resize(picture.size, way)
    scaled = np.clip(np.asarray(large), 0, 1)
    cover = Image.fromarray((scaled * opacity * 255).astype(np.uint8))
    shown = Image.composite(Image.fromarray(colorize(scaled)), picture.convert("RGB"), cover)
    return _with_scale(shown, most) if scale else shown


def _with_scale(picture: Image.Image, most: float) -> Image.Image:
    """A picture with the colours from 0 to `most` below it."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = picture.size
    font = ImageFont.load_default(_STRIP - 4)
    taller = Image.new("RGB", (width, height + _STRIP), "white")
    taller.paste(picture)
    draw = ImageDraw.Draw(taller)
    texts = ("0", f"{most:.3g}")
    left, right = (int(draw.textlength(text, font)) + 4 for text in texts)
    bar = np.linspace(0, 1, max(width - left - right, 1), dtype=np.float32)[None].repeat(_STRIP - 6, 0)
    taller.paste(Image.fromarray(colorize(bar)), (left, height + 3))
    draw.text((2, height + 1), texts[0], "black", font)
    draw.text((width - right + 2, height + 1), texts[1], "black", font)
    return taller
