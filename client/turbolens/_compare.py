"""Two pictures beside each other, in numbers and as a picture."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from turbolens._gallery import gallery
from turbolens._heatmap import colorize
from turbolens._start import HasImage

if TYPE_CHECKING:
    from PIL import Image

MOVED: Final = 8
"""Of 255: a pixel that differs by more, in any channel, has moved."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """How far two pictures are apart; made by :func:`compare`."""

    mean: float
    """Mean absolute difference of channels, of 255."""
    largest: int
    """Largest, of 255."""
    moved: float
    """Share of pixels that differ by more than 8 of 255 in a channel."""
    psnr: float
    """Peak signal-to-noise ratio in decibels; infinite where they are equal."""
    before: Image.Image
    after: Image.Image
    difference: Image.Image
    """The largest difference of each pixel's channels, coloured up to its own maximum."""

    def __repr__(self) -> str:
        return f"Comparison(mean {self.mean:.3g}, largest {self.largest}, moved {self.moved:.1%}, {self.psnr:.1f} dB)"

    def _repr_html_(self) -> str:
        return gallery([self.before, self.after, self.difference], ["before", "after", repr(self)])._repr_html_()


def compare(before: Any, after: Any) -> Comparison:
    """Two pictures, of ours, PIL's or arrays uint8 [height, width, 3].

    Raises:
        ValueError: they are of different sizes.
    """
    from PIL import Image

    a, b = _pixels(before), _pixels(after)
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]}; give two of one size")
    apart = np.abs(a.astype(np.int16) - b)
    pixel = apart.max(axis=2)
    error = float((apart.astype(np.float64) ** 2).mean())
    return Comparison(
        mean=float(apart.mean()),
        largest=int(apart.max()),
        moved=float((pixel > MOVED).mean()),
        psnr=math.inf if error == 0 else 10 * math.log10(255**2 / error),
        before=Image.fromarray(a),
        after=Image.fromarray(b),
        difference=Image.fromarray(colorize((pixel / max(pixel.max(), 1)).astype(np.float32))),
    )


def _pixels(picture: Any) -> npt.NDArray[np.uint8]:
    image = picture.image if isinstance(picture, HasImage) else picture
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"no picture: {pixels.dtype} {pixels.shape}; give uint8 [height, width, 3]")
    return pixels
