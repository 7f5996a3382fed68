"""Labels by an image-text encoder: the right word wins, and no word where none stands out."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from turbolens_server.catalog.labels import Example, FeatureLabels, Label
from turbolens_training.catalog.config import LEAST_CROPS
from turbolens_training.catalog.crops import Crops, crop_box, embed_crops
from turbolens_training.catalog.zero_shot import (
    ATTRIBUTE,
    Namer,
    compare,
    least_z,
    match_words,
    without_zero_shot,
)

RGB = {"red": (0.9, 0.1, 0.1), "yellow": (1, 0.9, 0.1), "green": (0.1, 0.6, 0.2), "blue": (0.1, 0.3, 0.9)}


class ColorEncoder:
    """A picture's embedding is its mean color, a word's the color that it names; both about middle gray."""

    name, hash = "colors", "0" * 64

    def __init__(self) -> None:
        self.pictures = 0

    def to(self, device: torch.device) -> None:
        pass

    def embed_pictures(self, pictures) -> torch.Tensor:
        self.pictures += len(pictures)
        means = np.stack([picture.reshape(-1, 3).mean(0) / 255 for picture in pictures])
        return normalize(torch.from_numpy(means).float() - 0.5, dim=-1)

    def embed_texts(self, texts) -> torch.Tensor:
        return normalize(torch.tensor([RGB[text] for text in texts]) - 0.5, dim=-1)


@pytest.mark.parametrize(
    ("y", "x", "grid", "size", "box"),
    [
        (8, 8, (16, 16), (512, 512), (192, 192, 352, 352)),  # 5 x 5 cells of 32 pixels, the cell in the middle
        (0, 15, (16, 16), (512, 512), (352, 0, 512, 160)),  # moved, not cut, where the picture ends
        (4, 4, (8, 8), (128, 128), (48, 48, 96, 96)),
        (3, 0, (4, 4), (64, 64), (0, 48, 16, 64)),
        (2, 20, (12, 24), (96, 192), (144, 0, 184, 40)),
    ],
)
def test_a_crop_is_a_square_of_whole_cells_around_the_place(y: int, x: int, grid, size, box) -> None:
    assert crop_box(y, x, grid, size) == box


@given(
    cosines=st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1, width=16)), min_size=1, max_size=24),
)
def test_z_and_auroc_are_those_of_the_definition(cosines: list[tuple[int, float]]) -> None:
    features, values = (torch.tensor(column) for column in zip(*cosines, strict=True))
    z, auroc = compare(values[:, None], features, 4)
    for feature in range(4):
        own = [value for f, value in cosines if f == feature]
        others = [value for f, value in cosines if f != feature]
        if min(len(own), len(others)) < LEAST_CROPS:
            assert (z[feature].item(), auroc[feature].item()) == (0, 0.5)
            continue
        wins = sum((a > b) + (a == b) / 2 for a in own for b in others)
        assert auroc[feature].item() == pytest.approx(wins / len(own) / len(others))
        spread = statistics.pstdev(others)
        if spread > 1e-3:
            error = spread * math.sqrt(1 / len(own) + 1 / len(others))
            margin = statistics.mean(own) - statistics.mean(others)
            assert z[feature].item() == pytest.approx(margin / error, rel=1e-6, abs=1e-6)


def test_the_word_that_sets_a_feature_apart_wins_over_one_that_fits_every_picture() -> None:
    """Feature 1 shows what "star" says, all pictures show what "picture" says, and show it more."""
    generator = torch.Generator().manual_seed(0)
    features = torch.arange(40).repeat_interleave(4)
    words = torch.eye(8)[:3]  # picture, star, moon
    images = 0.05 * torch.randn(160, 8, generator=generator) + words[0]
    images[features == 1] += 0.5 * words[1]
    found = match_words(Crops(features, normalize(images, dim=-1)), ["picture", "star", "moon"], words, 40, 0.01)
    assert set(found) == {1}
    assert found[1] == FeatureLabels(1, "star", 1.0, (Label(ATTRIBUTE, "star", "", 1.0),))


def test_chance_labels_no_more_features_than_stated() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.arange(1000).repeat_interleave(5)
    images = normalize(torch.randn(5000, 64, generator=generator), dim=-1)
    words = normalize(torch.randn(200, 64, generator=generator), dim=-1)
    names = [str(i) for i in range(200)]
    for chance in (0.01, 0.1):
        found = match_words(Crops(features, images), names, words, 1000, chance)
        assert 0.3 * chance < len(found) / 1000 < 1.5 * chance
    assert least_z(1000, 0.01) > least_z(10, 0.01) > 3


def _example(prompt: str, seed: int, y: int = 4, x: int = 4) -> Example:
    return Example(prompt, seed, 1, 0, y, x, 1.0)


def test_features_are_named_by_what_the_pictures_show_there(engine) -> None:
    """On pictures that `mini` draws: each color's feature by its color, and none that has no color of its own."""
    prompts = [f"a big {color} square in the center, snow background" for color in RGB]
    features = [[_example(prompt, seed) for seed in range(4)] for prompt in prompts]
    mixed = [_example(prompt, 0) for prompt in prompts]
    encoder = ColorEncoder()
    namer = Namer(encoder, list(RGB), None, 0.01)
    examples = {"up.0.0": [*features, mixed, features[0][:2], []], "up.0.1": [[], mixed]}
    named = namer.name(engine, examples)
    assert {feature: row.label for feature, row in named["up.0.0"].items()} == dict(enumerate(RGB))
    assert all(row.label_score > 0.9 for row in named["up.0.0"].values())
    assert named["up.0.1"] == {}
    assert encoder.pictures == 16  # what features share is drawn and embedded once
    assert embed_crops(engine, encoder, {"up.0.1": [[]]})["up.0.1"].features.shape == (0,)


def test_labels_of_an_earlier_encoder_go_and_others_stay() -> None:
    rows = {
        0: FeatureLabels(0, "cat", 0.9, (Label(ATTRIBUTE, "cat", "", 0.9),)),
        1: FeatureLabels(1, "dog", 0.9, (Label("label", "dog", "", 0.9),)),
        2: FeatureLabels(2, "", 0.0, ()),
    }
    assert set(without_zero_shot(rows)) == {1, 2}
