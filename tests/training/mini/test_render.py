"""The renderer draws what the scene says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    STYLES,
    TEXTURES,
    Scene,
    Thing,
    encode_scenes,
    sample_codes,
)

STILL = torch.zeros(1, 16)


def draw(scene, size=64):
    picture, cover = render(encode_scenes([scene]), STILL, size)
    return picture[0], cover[0, 0]


BASE = Scene((Thing("circle", "red", "plain", "big"),), "left", "sky", "flat")


def changed(**fields):
    thing = {k: v for k, v in fields.items() if k in ("shape", "color", "texture", "size")}
    scene = {k: v for k, v in fields.items() if k not in thing}
    return dataclasses.replace(BASE, things=(dataclasses.replace(BASE.things[0], **thing),), **scene)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("shape", SHAPES),
        ("color", COLORS),
        ("texture", TEXTURES),
        ("size", ("small", "big")),
        ("background", BACKGROUNDS),
        ("style", STYLES),
        ("layout", ("left", "right", "top", "bottom", "center")),
    ],
)
def test_every_value_of_every_attribute_is_another_picture(field, values):
    pictures = torch.stack([draw(changed(**{field: value}))[0] for value in values])
    difference = (pictures[:, None] - pictures[None]).square().mean((2, 3, 4)).sqrt()
    difference.fill_diagonal_(1)
    assert difference.min() > 0.03, field


def test_cover_is_where_the_thing_is():
    picture, cover = draw(BASE)
    rows, columns = torch.nonzero(cover > 0.5, as_tuple=True)
    assert columns.float().mean() < 32
    assert abs(rows.float().mean() - 31.5) < 1
    inside = picture[:, cover == 1]
    assert (inside[0] > 0.5).all()
    assert (inside[1] < 0).all()
    assert not draw(Scene())[1].any()


def test_batches_equal_single_pictures_and_stay_in_range():
    generator = torch.Generator().manual_seed(2)
    codes, jitter = sample_codes(40, generator), 3 * torch.randn(40, 16, generator=generator)
    pictures, cover = render(codes, jitter, 32)
    assert pictures.abs().max() <= 1
    assert cover.min() >= 0
    assert cover.max() <= 1
    for i in (0, 13, 39):
        alone, alone_cover = render(codes[i : i + 1], jitter[i : i + 1], 32)
        assert torch.allclose(alone[0], pictures[i], atol=1e-6)
        assert torch.allclose(alone_cover[0], cover[i], atol=1e-6)


def test_jitter_moves_a_thing_by_little():
    moved = STILL.clone()
    moved[0, 0] = 2
    codes = encode_scenes([BASE])
    columns = [
        (render(codes, jitter, 64)[1][0, 0] * torch.arange(64)).sum() / render(codes, jitter, 64)[1].sum()
        for jitter in (STILL, moved)
    ]
    assert 1 < columns[1] - columns[0] < 5
