"""What tests need to know of the page's pictures: where a point of one is on the screen, what a stroke paints."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math

import numpy as np
from PIL import Image

SIZE = 128
"""Pixels of the embedded model's pictures."""


@dataclasses.dataclass
class View:
    """Where a picture lies in its element, and so on the page; the twin of `lib/view.ts`."""

    left: float
    top: float
    scale: float
    x: float
    y: float

    @classmethod
    def fit(cls, box: dict) -> View:
        scale = min(box["width"], box["height"]) / SIZE
        return cls(box["x"], box["y"], scale, (box["width"] - SIZE * scale) / 2, (box["height"] - SIZE * scale) / 2)

    def zoomed(self, delta: float, at: tuple[float, float]) -> View:
        """After a turn of the wheel at a point of the page."""
        scale = min(32, max(0.25, self.scale * math.exp(-delta / 400)))
        ratio = scale / self.scale
        x, y = at[0] - self.left, at[1] - self.top
        return dataclasses.replace(self, scale=scale, x=x - (x - self.x) * ratio, y=y - (y - self.y) * ratio)

    def on_page(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.x + x * self.scale, self.top + self.y + y * self.scale

    def in_picture(self, at: tuple[float, float]) -> tuple[float, float]:
        return (at[0] - self.left - self.x) / self.scale, (at[1] - self.top - self.y) / self.scale


def stroke(points: list[tuple[float, float]], radius: float, hardness: float = 0.6, value: float = 1.0) -> np.ndarray:
    """The mask that a stroke paints, [128, 128] uint8: the twin of `lib/raster.ts`."""
    inner = radius * hardness
    outer = max(radius, inner + 1)
    spacing = max(0.5, radius / 4)
    dabs = [points[0]]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / spacing))
        dabs += [(x0 + (x1 - x0) * k / count, y0 + (y1 - y0) * k / count) for k in range(1, count + 1)]
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    cover = np.zeros((SIZE, SIZE))
    for x, y in dabs:
        t = np.clip((outer - np.hypot(columns - x, rows - y)) / (outer - inner), 0, 1)
        cover = np.maximum(cover, t * t * (3 - 2 * t))
    return np.floor(255 * cover * value + 0.5).astype(np.uint8)


def mask_of(edit: dict) -> np.ndarray:
    """The mask of an edit as it was sent."""
    with Image.open(io.BytesIO(base64.b64decode(edit["mask"]["png"]))) as image:
        assert image.mode == "L"
        return np.asarray(image)


def on_grid(mask: np.ndarray, cells: int = 8) -> np.ndarray:
    """Its mean over each cell."""
    side = SIZE // cells
    return mask.reshape(cells, side, cells, side).mean((1, 3))
