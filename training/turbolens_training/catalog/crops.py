"""Crops of the pictures that lift features most, around the places where they do, embedded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.catalog.labels import Example
from turbolens_server.engine.batcher import MAX_BATCH
from turbolens_server.engine.decode import Picture
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_training.catalog.encoder import Encoder


class Box(NamedTuple):
    """A part of a picture in pixels; right and bottom are outside."""

    left: int
    top: int
    right: int
    bottom: int


class _Made(NamedTuple):
    """What makes a picture again."""

    prompt: str
    seed: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Crops:
    """The crops of one SAE's features, E in all."""

    features: Tensor  # [E] int64, whose each is
    embedded: Tensor  # [E, D] float32, norm 1


def crop_box(y: int, x: int, grid: tuple[int, int], size: tuple[int, int]) -> Box:
    """The square around a cell, about a third as wide as the picture.

    Less shows an encoder too little to name; more is no place any more. It is of whole cells, and moved where the
    picture ends: 5 x 5 on a grid of 16, 3 x 3 on one of 8.

    Args:
        y: the cell's row.
        x: the cell's column.
        grid: rows and columns.
        size: height and width of the picture in pixels.
    """
    reach = min(grid) // 6
    side = 2 * reach + 1
    first = [min(max(at - reach, 0), cells - side) for at, cells in zip((y, x), grid, strict=True)]
    top, left = (at * edge // cells for at, edge, cells in zip(first, size, grid, strict=True))
    bottom, right = ((at + side) * edge // cells for at, edge, cells in zip(first, size, grid, strict=True))
    return Box(left, top, right, bottom)


def embed_crops(
    engine: Engine, encoder: Encoder, examples: Mapping[str, Sequence[Sequence[Example]]]
) -> dict[str, Crops]:
    """Make the pictures of top examples again, and embed the crop of each example.

    A picture is made once, and a crop embedded once, however many features share it. A picture that does not come out
    finite has no crops.

    Args:
        engine: the model.
        encoder: what embeds.
        examples: by hook point, those of every feature.

    Returns:
        By hook point.
    """
    size = engine.info.default_size
    grids = {point.name: point.grid(*size) for point in engine.info.hook_points}
    places = {
        block: [
            (feature, _Made(example.prompt, example.seed, example.steps), crop_box(example.y, example.x, grid, size))
            for feature, own in enumerate(features)
            for example in own
        ]
        for (block, features), grid in ((item, grids[item[0]]) for item in examples.items())
    }
    boxes: dict[_Made, dict[Box, None]] = {}
    for _, made, box in itertools.chain.from_iterable(places.values()):
        boxes.setdefault(made, {})[box] = None
    found: dict[tuple[_Made, Box], Tensor] = {}  # [D] each
    for made, picture in tqdm(_pictures(engine, list(boxes)), desc="crops", unit="picture", total=len(boxes)):
        own = list(boxes[made])
        crops = [picture[box.top : box.bottom, box.left : box.right] for box in own]
        found |= {(made, box): row for box, row in zip(own, encoder.embed_pictures(crops), strict=True)}
    embedded = {}
    for block, of_block in places.items():
        there = [(feature, found[made, box]) for feature, made, box in of_block if (made, box) in found]
        if there:
            features, rows = zip(*there, strict=True)
            embedded[block] = Crops(torch.tensor(features), torch.stack(rows))
        else:
            embedded[block] = Crops(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1))
    return embedded


def _pictures(engine: Engine, wanted: Sequence[_Made]) -> Iterator[tuple[_Made, Picture]]:
    """Pictures in batches of as many steps; those that are finite."""
    for _, group in itertools.groupby(sorted(wanted, key=lambda made: made.steps), key=lambda made: made.steps):
        alike = list(group)
        for start in range(0, len(alike), MAX_BATCH):
            batch = alike[start : start + MAX_BATCH]
            jobs = [Job(made.prompt, made.seed, made.steps, *engine.info.default_size) for made in batch]
            for made, result in zip(batch, engine.decode(engine.denoise(jobs)), strict=True):
                if result is not None and result.picture is not None:
                    yield made, result.picture
