"""Which features a region of a picture has more of than the rest of it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from turbolens._edits import FeatureRef, Mask
from turbolens._ranks import Floats, separate

_SAMPLES: Final = 16
"""Of a cell of the grid, each way, when a mask's shapes are drawn."""


@dataclasses.dataclass(frozen=True, slots=True)
class Located:
    """A feature and where it is active; goes straight into an edit."""

    ref: FeatureRef
    label: str
    effect: float
    """Cliff's delta: the chance that a position of the region has it stronger than one of the rest, minus that of the
    reverse; -1 to 1."""
    inside: float
    """Mean activation over the region, zeros counted."""
    outside: float
    """Over the rest."""


def on_grid(mask: Mask, height: int, width: int) -> Floats:
    """A mask's average over each cell of a grid, [height, width] in [0, 1]; polygons to 1 in 16 of a cell."""
    from PIL import Image, ImageDraw

    shape = mask.message.WhichOneof("shape")
    if shape == "png":
        with Image.open(io.BytesIO(mask.message.png)) as image:
            grey = np.asarray(image if image.mode.startswith("I") else image.convert("L"), np.float64)
        grey /= 65535 if grey.max() > 255 else 255
        resized = Image.fromarray(grey.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        return np.asarray(resized, np.float64).clip(0, 1)
    size = (width * _SAMPLES, height * _SAMPLES)
    sheet = Image.new("1", size)
    draw = ImageDraw.Draw(sheet)
    for box in mask.message.boxes.boxes:
        left, top, right, bottom = (
            round(edge * size[at % 2]) for at, edge in enumerate((box.left, box.top, box.right, box.bottom))
        )
        if left < right and top < bottom:
            draw.rectangle((left, top, right - 1, bottom - 1), fill=1)
    for polygon in mask.message.polygons.polygons:
        draw.polygon([(p.x * size[0], p.y * size[1]) for p in polygon.points], fill=1)
    cells = np.asarray(sheet, np.float64).reshape(height, _SAMPLES, width, _SAMPLES)
    average: Floats = cells.mean(axis=(1, 3))
    return average


def located(sae: str, dense: npt.NDArray[np.float32], labels: Mapping[int, str], mask: Mask) -> list[Located]:
    """Every feature that is active in a region, of activations [steps, height, width, d_sae]."""
    grid = on_grid(mask, *dense.shape[1:3]).ravel()
    region = grid >= 0.5
    if not 0 < region.sum() < len(region):
        what = "nothing" if not region.any() else "everything"
        raise ValueError(f"the mask covers {what} on the grid of {sae}, so there is nothing to hold it to")
    z = dense.mean(axis=0, dtype=np.float64).reshape(len(region), -1)
    active = np.flatnonzero(z[region].max(0) > 0)
    effects, _ = separate(z[region][:, active], z[~region][:, active])
    return [
        Located(
            FeatureRef(sae, int(index)), labels.get(int(index), ""), float(effects[i]),
            float(z[region, index].mean()), float(z[~region, index].mean()),
        )
        for i, index in enumerate(active)
    ]  # fmt: skip
