from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import binomtest

from turbolens_server.engine.engine import Engine
from turbolens_server.steering.edits import Edit
from turbolens_training.evaluation.dose import Steering, candidates, choose, labelled_features
from turbolens_training.measures.concepts import Concept, draw_scenes
from turbolens_training.measures.counterfactual import Effect, Sheet, interval
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import COUNT, jitter_from_noise

CONCEPTS = {str(concept): concept for concept in Concept.all()}


@pytest.mark.parametrize("name", ["color=blue", "background=night", "style=neon", "position=left", "shape=star"])
def test_the_judge_knows_a_perfect_edit_from_none(tiny_engine: Engine, name: str) -> None:
    concept = CONCEPTS[name]
    scenes = draw_scenes(tiny_engine, concept, 6, "test")
    assert (scenes.codes[:, COUNT] == 1).all()
    assert (scenes.codes[:, concept.column] != concept.code).all()
    jitter = jitter_from_noise(scenes.noise)
    wanted = scenes.codes.clone()
    wanted[:, concept.column] = concept.code
    sheet = Sheet(scenes, 32)
    edited, untouched = (sheet.judge(concept, render(codes, jitter, 32)[0]) for codes in (wanted, scenes.codes))
    assert (edited.count, edited.moved, edited.nearest, edited.others) == (6, 1.0, 1.0, 1.0)
    assert edited.margin == pytest.approx(1.0, abs=1e-4)
    assert (untouched.moved, untouched.nearest, untouched.others) == (0.0, 0.0, 1.0)
    assert untouched.margin == pytest.approx(-1.0, abs=1e-4)
    grey = sheet.judge(concept, torch.zeros(6, 3, 32, 32))
    assert grey.others < 0.9


def test_candidates_are_the_best_labelled_of_each_block() -> None:
    def row(index: int, value: str, score: float, sureness: float = 0.5) -> dict:
        label = {"attribute": "color", "value": value, "region": "thing", "score": score}
        return {"index": index, "labels": [label], "sureness": sureness}

    rows = [row(0, "blue", 0.98, 0.1), row(1, "red", 0.99), row(2, "blue", 0.9), row(3, "blue", 0.8)]
    blue = CONCEPTS["color=blue"]
    assert labelled_features(rows, blue, 2) == [2, 3]
    found = candidates({"mid.0": rows, "up.0.1": []}, blue, 2)
    assert [steering.features for steering in found] == [(2,), (3,), (2, 3, 0)]
    assert found[0].call(8) == 'tl.add("mid.0/2", 8)'
    assert found[2].call(6) == 'tl.add({"mid.0/2": 0.5774, "mid.0/3": 0.5774, "mid.0/0": 0.5774}, 6)'
    edit = found[2].edit(6.0)
    assert sum(feature.weight**2 for feature in edit.features) == pytest.approx(1)
    assert edit.amount == 6.0


def test_a_group_of_the_catalog_is_tried_whole_and_by_its_first_at_full_weight() -> None:
    def row(index: int, rank: int) -> dict:
        return {"index": index, "labels": [], "effects": [{"attribute": "color", "value": "blue", "rank": rank}]}

    found = candidates({"up.0.0": [row(7, 2), row(9, 1)]}, CONCEPTS["color=blue"], 2)
    assert found == [Steering("up.0.0", (9, 7)), Steering("up.0.0", (9,))]
    assert found[0].call(4) == 'tl.add(["up.0.0/9", "up.0.0/7"], 4)'


def test_a_third_value_may_be_nearer_by_the_test_of_two_and_is_not_by_that_of_all(tiny_engine: Engine) -> None:
    """What is drawn purple, was yellow and should be blue is nearer to blue than to yellow, and nearest to purple."""
    concept = CONCEPTS["color=blue"]
    scenes = draw_scenes(tiny_engine, concept, 4, "test")
    yellow, purple = scenes.codes.clone(), scenes.codes.clone()
    yellow[:, concept.column], purple[:, concept.column] = CONCEPTS["color=yellow"].code, CONCEPTS["color=purple"].code
    picture = render(purple, jitter_from_noise(scenes.noise), 32)[0]
    effect = Sheet(dataclasses.replace(scenes, codes=yellow), 32).judge(concept, picture)
    assert (effect.moved, effect.nearest) == (1.0, 0.0)


def test_strengths_are_chosen_where_they_move_most_and_break_least() -> None:
    def judge(edit: Edit) -> Effect:
        good = 1 - abs(edit.amount - 8) / 16
        return Effect(10, 1.0, good if edit.features[0].index == 1 else good / 2, 0.0, 1.0)

    trials = choose(judge, [Steering("a", (0,)), Steering("a", (1,))], [4.0, 8.0, 16.0])  # type: ignore[arg-type]
    assert (trials[0].steering.features, trials[0].strength, trials[0].effect.nearest) == ((1,), 8.0, 1.0)
    assert trials[1].strength == 8.0


@pytest.mark.parametrize(("share", "count"), [(0.0, 20), (0.5, 48), (1.0, 48)])
def test_intervals_are_those_of_wilson(share: float, count: int) -> None:
    low, high = interval(share, count)
    expected = binomtest(round(share * count), count).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-3)
