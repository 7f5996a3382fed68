"""Two pictures beside each other, in numbers and as a picture of their difference."""

from __future__ import annotations

import base64
import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from turbolens_studio.features import FloatGrid

Pixels = npt.NDArray[np.uint8]
_SEEN: Final = 8
"""Of 255: a change of a pixel from which on it is counted."""


def difference(a: Pixels, b: Pixels, gain: int) -> Pixels:
    """|a - b| times a gain, black where equal.

    Raises:
        ValueError: the pictures are not of one size.
    """
    _check(a, b)
    apart = np.abs(a.astype(np.int16) - b) * gain
    return np.asarray(np.clip(apart, 0, 255), np.uint8)


def numbers(a: Pixels, b: Pixels, mask: FloatGrid | None = None) -> dict[str, Any]:
    """How far two pictures are apart; inside and outside of a mask, where there is one.

    Raises:
        ValueError: the pictures are not of one size.
    """
    _check(a, b)
    apart = np.abs(a.astype(np.float64) - b)
    mean = apart.mean(-1)
    square = float((apart**2).mean())
    told: dict[str, Any] = {
        "equal": square == 0,
        "mean": float(mean.mean()),
        "max": float(apart.max()),
        "changed": float((mean > _SEEN).mean()),
        "psnr": None if square == 0 else float(10 * np.log10(255**2 / square)),
    }
    if mask is not None:
        weights = on_grid(mask, *mean.shape)
        for name, share in (("inside", weights), ("outside", 1 - weights)):
            told[name] = float((mean * share).sum() / share.sum()) if share.sum() > 0 else None
    return told


def read_mask(text: str) -> FloatGrid:
    """A mask as the page sends it, base64 of a grey PNG, in [0, 1].

    Raises:
        ValueError: it is none.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.mode not in ("L", "1"):
                raise ValueError(f"pixels of mode {image.mode}, expected grey")
            return np.asarray(image.convert("L"), np.float32) / np.float32(255)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask: no grey PNG in base64 ({error})") from None


def _check(a: Pixels, b: Pixels) -> None:
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape[1]} x {a.shape[0]} and {b.shape[1]} x {b.shape[0]} pixels")


def on_grid(weights: FloatGrid, height: int, width: int) -> FloatGrid:
    """Weights of any size, averaged over each cell of a grid."""

    def average(cells: int, samples: int) -> npt.NDArray[np.float64]:
        cell, sample = np.arange(cells)[:, None] / cells, np.arange(samples)[None] / samples
        overlap = np.minimum(cell + 1 / cells, sample + 1 / samples) - np.maximum(cell, sample)
        shares: npt.NDArray[np.float64] = np.clip(overlap, 0, None) * cells
        return shares

    return (average(height, weights.shape[0]) @ weights @ average(width, weights.shape[1]).T).astype(np.float32)
