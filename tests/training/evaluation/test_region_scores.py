"""The measure of regions: what renderings themselves come to, which are right by construction, or wrong."""

from __future__ import annotations

import pytest
import torch

from turbolens_training.evaluation.regions import HEARD, TwoThings, exchanged, score
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import Scene, Thing, encode_scenes, jitter_from_noise, thing_column

SCENE = Scene(
    (Thing("ring", "red", "striped", "big"), Thing("star", "blue", "plain", "small")), "above", "snow", "neon"
)


@pytest.fixture(scope="module")
def scenes(engine) -> TwoThings:
    return TwoThings.draw(engine, 24, 0)


def drawn(scenes: TwoThings, codes: torch.Tensor) -> dict[str, float]:
    pictures, _ = render(codes, jitter_from_noise(scenes.noise), 32)
    return {name: float(str(share).split()[0]) for name, share in score(scenes, pictures).items()}


def test_scenes_have_two_things_that_differ(scenes):
    assert len(scenes.scenes) == 24
    assert all(len(scene.things) == 2 for scene in scenes.scenes)
    assert all(a.color != b.color or a.shape != b.shape or a.texture != b.texture for a, b in
               (scene.things for scene in scenes.scenes))  # fmt: skip


def test_the_exact_picture_is_all_right(scenes):
    assert drawn(scenes, scenes.codes) == {
        "shape": 100, "color": 100, "texture": 100, "all of both": 100, "arrangement": 100, "leaked": 0
    }  # fmt: skip


def test_colors_that_changed_places_have_leaked(scenes):
    codes, columns = scenes.codes.clone(), [thing_column(slot, "color") for slot in range(2)]
    codes[:, columns] = codes[:, columns[::-1]]
    found = drawn(scenes, codes)
    bound = [[thing_column(slot, name) for name in ("color", "shape", "texture")] for slot in range(2)]
    differ = (scenes.codes[:, bound[0]] != scenes.codes[:, bound[1]]).float().sum(0)
    assert found["leaked"] >= float(100 * differ[0] / differ.sum()) - 2
    assert found["color"] == pytest.approx(100 * (1 - float(differ[0]) / 24), abs=8)


def test_things_that_changed_places_are_not_right(scenes):
    wrong = drawn(scenes, encode_scenes([exchanged(scene) for scene in scenes.scenes]))
    assert wrong["leaked"] > 40
    assert wrong["all of both"] == 0
    assert wrong["arrangement"] < 5


def test_what_the_halves_hear():
    assert HEARD[""](SCENE) == ()
    assert HEARD[", regions"](SCENE) == ("a big striped red ring", "a small blue star")
    assert HEARD[", regions in full"](SCENE) == (
        "a big striped red ring at the top, snow background, neon style",
        "a small blue star at the bottom, snow background, neon style",
    )
