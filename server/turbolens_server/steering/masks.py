"""Masks: a weight in [0, 1] for every point of the picture, averaged over each cell of a block's grid."""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatGrid = npt.NDArray[np.float32]

MAX_EDGE = 4096
"""Pixels of a mask's PNG, each way."""
_PNG_HEAD = struct.Struct(">8sI4sII")
_PNG_CHUNKS = 4096
"""Chunks of a mask's PNG, at most."""
_CELL_SAMPLES = 16
"""Samples per cell and direction when a polygon is rasterised."""


class Mask(Protocol):
    """Anything that covers part of a picture."""

    def on_grid(self, height: int, width: int) -> FloatGrid:
        """Mean weight of each cell, [height, width] in [0, 1]."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """An upright box in fractions of the picture, origin at the top left."""

    left: float
    top: float
    right: float
    bottom: float


@dataclasses.dataclass(frozen=True, slots=True)
class BoxMask:
    """The union of boxes, exact to the cell's area."""

    boxes: tuple[Box, ...]

    def on_grid(self, height: int, width: int) -> FloatGrid:
        # Cut the picture at every box edge and cell edge: each piece is wholly inside or outside the union.
        xs = np.unique(
            np.concatenate([np.linspace(0, 1, width + 1), [e for b in self.boxes for e in (b.left, b.right)]])
        )
        ys = np.unique(
            np.concatenate([np.linspace(0, 1, height + 1), [e for b in self.boxes for e in (b.top, b.bottom)]])
        )
        mid_x, mid_y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
        inside = np.zeros((len(mid_y), len(mid_x)), bool)
        for box in self.boxes:
            rows = (mid_y > box.top) & (mid_y < box.bottom)
            columns = (mid_x > box.left) & (mid_x < box.right)
            inside |= rows[:, None] & columns[None]
        area = inside * np.diff(ys)[:, None] * np.diff(xs)[None]
        grid = np.zeros((height, width))
        row_of = np.minimum((mid_y * height).astype(int), height - 1)
        column_of = np.minimum((mid_x * width).astype(int), width - 1)
        np.add.at(grid, (row_of[:, None], column_of[None]), area)
        return np.clip(grid * (height * width), 0, 1).astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class PolygonMask:
    """The union of polygons; points are (x, y) fractions of the picture."""

    polygons: tuple[tuple[tuple[float, float], ...], ...]

    def on_grid(self, height: int, width: int) -> FloatGrid:
        rows, columns = height * _CELL_SAMPLES, width * _CELL_SAMPLES
        inside = np.zeros((rows, columns), bool)
        for polygon in self.polygons:
            inside |= _inside(np.array(polygon, np.float64), rows, columns)
        cells = inside.reshape(height, _CELL_SAMPLES, width, _CELL_SAMPLES)
        grid: FloatGrid = cells.mean(axis=(1, 3), dtype=np.float32)
        return grid


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PictureMask:
    """A grey picture of any size, stretched over the picture to make; values in [0, 1]."""

    weights: FloatGrid  # [any, any]

    def on_grid(self, height: int, width: int) -> FloatGrid:
        return (
            _area_average(height, self.weights.shape[0]) @ self.weights @ _area_average(width, self.weights.shape[1]).T
        ).astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GridMask:
    """A mask on the grids that it will be asked for, in place of the shapes or the picture it was given as."""

    grids: dict[tuple[int, int], FloatGrid]
    """By (rows, columns)."""

    def on_grid(self, height: int, width: int) -> FloatGrid:
        return self.grids[height, width]


def _inside(polygon: npt.NDArray[np.float64], rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Which of rows x columns sample points, each in the middle of its own cell, lie in a polygon, [rows, columns].

    By the even-odd rule: a point is inside where a ray from the left edge to it crosses an odd number of sides.
    """
    x0, y0 = polygon.T
    x1, y1 = np.roll(polygon, -1, axis=0).T
    y = (np.arange(rows) + 0.5) / rows
    row, side = np.nonzero((y0 <= y[:, None]) != (y1 <= y[:, None]))
    x = x0[side] + (y[row] - y0[side]) / (y1[side] - y0[side]) * (x1[side] - x0[side])
    crossings = np.zeros((rows, columns + 1), np.int32)  # before which sample of its row each one is
    np.add.at(crossings, (row, np.clip(np.ceil(x * columns - 0.5), 0, columns).astype(np.int64)), 1)
    inside: npt.NDArray[np.bool_] = crossings.cumsum(axis=1)[:, :columns] % 2 == 1
    return inside


def _area_average(cells: int, samples: int) -> npt.NDArray[np.float64]:
    """The matrix [cells, samples] that averages `samples` equal intervals over `cells` equal intervals."""
    cell = np.arange(cells)[:, None] / cells
    sample = np.arange(samples)[None] / samples
    overlap = np.minimum(cell + 1 / cells, sample + 1 / samples) - np.maximum(cell, sample)
    weights: npt.NDArray[np.float64] = np.clip(overlap, 0, None) * cells
    return weights


def png_size(data: bytes) -> tuple[int, int] | None:
    """The (width, height) that a PNG says it has, from its first bytes; None where they are no PNG's."""
    if len(data) < _PNG_HEAD.size:
        return None
    signature, _, kind, width, height = _PNG_HEAD.unpack_from(data)
    return (width, height) if (signature, kind) == (b"\x89PNG\r\n\x1a\n", b"IHDR") else None


def pixels_only(data: bytes) -> bytes:
    """A PNG without what is not pixels: texts and colour profiles are packed too, and unpack to anything."""
    kept, at = [data[:8]], 8
    for _ in range(_PNG_CHUNKS):
        if at + 12 > len(data):
            return b"".join(kept)
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[at : at + 12 + length])
        at += 12 + length
    raise ValueError(f"not a readable PNG (more than {_PNG_CHUNKS} chunks)")


def read_png(data: bytes) -> PictureMask:
    """A mask from the bytes of a grey PNG.

    Raises:
        ValueError: the bytes are no PNG, are broken, are not grey, or hold more than `MAX_EDGE` squared pixels; the
            text says which.
    """
    if (size := png_size(data)) is None:
        raise ValueError("not a readable PNG (it does not begin like one)")
    if max(size) > MAX_EDGE:
        raise ValueError(f"{size[0]} x {size[1]} pixels; at most {MAX_EDGE} x {MAX_EDGE} are allowed")
    try:
        with Image.open(io.BytesIO(pixels_only(data)), formats=["PNG"]) as image:
            if image.size != size:
                raise ValueError("not a readable PNG (it says two sizes)")
            sixteen = image.mode.startswith("I")
            if not sixteen and image.mode not in ("1", "L"):  # how dark is a colour, and is what is clear black?
                raise ValueError(f"pixels of mode {image.mode}; a mask is a grey PNG, of 1, 8 or 16 bits and no alpha")
            grey = np.asarray(image if sixteen else image.convert("L"), np.float32)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        raise ValueError(f"not a readable PNG ({error})") from error
    return PictureMask(grey / np.float32(65535 if sixteen else 255))
