"""The measure of regions: what renderings themselves come to, which are right by construction, or wrong."""

from __future__ import annotations

import pytest
import torch

from turbolens_training.evaluation.regions import (
    BINDS,
    CLAIMS,
    HEARD,
    LEAKS,
    RELATES,
    TwoThings,
    exchanged,
    judge_claims,
    judge_time,
    score,
    shares,
)
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
    return {name: float(str(share).split()[0]) for name, share in shares(score(scenes, pictures)).items()}


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


def hits(right: int, n: int = 40) -> dict[str, torch.Tensor]:
    """So many of n right, and none leaked where they are."""
    each = torch.arange(n) < right
    return {BINDS: each, RELATES: each, LEAKS: ~each}


def test_claims_are_judged_over_pairs_and_only_where_both_ways_were_drawn():
    claims = judge_claims({"prompt": hits(20), "prompt, gates": hits(34), "prompt, regions": hits(8)})
    holds = {claim["claim"]: claim["holds"] for claim in claims}
    assert [holds[name] for name, *_ in CLAIMS if name in holds] == ["yes"] * 3 + ["no"] * 4
    gates = claims[0]
    assert (gates["n"], gates["won"], gates["lost"]) == (40, 14, 0)
    assert gates["better by"] == "+35.0 ± 14.8"  # 1.96 sqrt(.35 (1 - .35) / 40)
    assert gates["here"].startswith("prompt, gates: 85.0 (")
    assert {claim["holds"] for claim in judge_claims({"prompt": hits(20), "prompt, gates": hits(21)})} == {"not shown"}
    assert judge_claims({"prompt": hits(20)}) == []


@pytest.mark.parametrize(("ratio", "holds"), [(1.01, "yes"), (1.2, "no"), (1.05, "not shown")])
def test_time_is_told_by_the_batches_that_were_drawn_in_turns(ratio, holds):
    plain = torch.tensor([1.0, 2.0, 1.0, 2.0])
    gated = ratio * plain * torch.tensor([1.001, 0.999, 1.001, 0.999])
    (claim,) = judge_time({"prompt": plain, "prompt, gates": gated})
    assert (claim["holds"], claim["n"]) == (holds, 4)
    assert judge_time({"prompt": plain}) == []


def test_what_the_halves_hear():
    assert HEARD[""](SCENE) == ()
    assert HEARD[", regions"](SCENE) == ("a big striped red ring", "a small blue star")
    assert HEARD[", regions in full"](SCENE) == (
        "a big striped red ring at the top, snow background, neon style",
        "a small blue star at the bottom, snow background, neon style",
    )
