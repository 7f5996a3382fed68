"""The world that `mini` draws: typed scenes, and what in them a caption does not say.

A scene holds everything a caption can name. Everything a caption leaves open (the exact place, tilt and shade of
an object, the slant of the background) is read off the first noise by :func:`jitter_from_noise`, so that
(caption, noise) decides the picture completely and a one-step generator can learn it by plain regression.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

SHAPES: Final = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS: Final = ("red", "yellow", "green", "blue", "purple", "pink", "white", "black")
TEXTURES: Final = ("plain", "striped")
SIZES: Final = ("small", "big")
BACKGROUNDS: Final = ("sky", "grass", "night", "sunset", "snow")
STYLES: Final = ("flat", "neon")
PLACES: Final = ("left", "right", "top", "bottom", "center")
RELATIONS: Final = ("left of", "above")
LAYOUTS: Final = (*PLACES, *RELATIONS)

JITTER_DIM: Final = 16
"""Independent standard normals that :func:`jitter_from_noise` finds in one first noise."""


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    shape: str = "circle"
    color: str = "red"
    texture: str = "plain"
    size: str = "big"


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """The ground truth of one picture.

    `layout` is one of :data:`PLACES` for a single thing, and one of :data:`RELATIONS` for two, read as
    "the first is <relation> the second". A scene without things has layout ``center``.
    """

    things: tuple[Thing, ...] = ()
    layout: str = "center"
    background: str = "sky"
    style: str = "flat"

    def __post_init__(self) -> None:
        allowed = RELATIONS if len(self.things) == 2 else PLACES
        if len(self.things) > 2 or self.layout not in allowed:
            raise ValueError(f"{len(self.things)} things cannot be laid out {self.layout!r}; allowed: {allowed}")


# One row of codes per scene, so that rendering and scoring are array work:
# count, layout, background, style, then shape, color, texture, size of the first and of the second thing.
CODE_DIM: Final = 12
COUNT, LAYOUT, BACKGROUND, STYLE = range(4)
THING_FIELDS: Final = (("shape", SHAPES), ("color", COLORS), ("texture", TEXTURES), ("size", SIZES))
CODE_SIZES: Final = (3, len(LAYOUTS), len(BACKGROUNDS), len(STYLES)) + 2 * tuple(len(v) for _, v in THING_FIELDS)


def thing_column(slot: int, field: str) -> int:
    """Column of `field` of the thing in `slot` (0 or 1)."""
    return 4 + 4 * slot + [name for name, _ in THING_FIELDS].index(field)


def encode_scenes(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as codes, int64 [B, CODE_DIM]; a missing thing has zeros."""
    rows = []
    for scene in scenes:
        row = [
            len(scene.things),
            LAYOUTS.index(scene.layout),
            BACKGROUNDS.index(scene.background),
            STYLES.index(scene.style),
        ]
        for slot in range(2):
            thing = scene.things[slot] if slot < len(scene.things) else None
            row += [vocabulary.index(getattr(thing, f)) if thing else 0 for f, vocabulary in THING_FIELDS]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, CODE_DIM)


def decode_scenes(codes: Tensor) -> list[Scene]:
    """The inverse of :func:`encode_scenes`."""
    scenes = []
    for row in codes.tolist():
        things = tuple(
            Thing(**{f: vocabulary[row[thing_column(slot, f)]] for f, vocabulary in THING_FIELDS})
            for slot in range(row[COUNT])
        )
        scenes.append(Scene(things, LAYOUTS[row[LAYOUT]], BACKGROUNDS[row[BACKGROUND]], STYLES[row[STYLE]]))
    return scenes


def sample_codes(n: int, generator: torch.Generator, *, device: str | torch.device = "cpu") -> Tensor:
    """Random scenes as codes [n, CODE_DIM]: 5 % empty, 35 % with one thing, 60 % with two (they are harder).

    Draws on the CPU, so that the same generator gives the same scenes on every device.
    """
    codes = torch.stack([torch.randint(size, (n,), generator=generator) for size in CODE_SIZES], 1)
    share = torch.rand(n, generator=generator)
    count = (share > 0.05).long() + (share > 0.40).long()
    places, relations = len(PLACES), len(RELATIONS)
    codes[:, COUNT] = count
    place = torch.randint(places, (n,), generator=generator)
    relation = places + torch.randint(relations, (n,), generator=generator)
    codes[:, LAYOUT] = torch.where(count == 2, relation, place)
    codes[count == 0, LAYOUT] = PLACES.index("center")
    for slot in range(2):
        absent = count <= slot
        codes[absent, 4 + 4 * slot : 8 + 4 * slot] = 0
    return codes.to(device)


def jitter_from_noise(noise: Tensor) -> Tensor:
    """Read the scene's jitter off a first noise: [B, 4, h, w] standard normal -> [B, 16] standard normal.

    The mean of a quadrant of n cells has standard deviation 1/sqrt(n), and quadrants share no cell, so the
    sixteen scaled means (4 channels x 4 quadrants) are independent standard normals, at any resolution.
    """
    batch, channels, height, width = noise.shape
    quadrants = noise.reshape(batch, channels, 2, height // 2, 2, width // 2)
    scale: float = (height * width / 4) ** 0.5
    return quadrants.mean((3, 5)).reshape(batch, JITTER_DIM) * scale
