from __future__ import annotations

import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_training.evaluation.dose import candidates, judge, labelled_features
from turbolens_training.measures.concepts import Concept, draw_scenes
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
    edited, untouched = (judge(scenes, concept, render(codes, jitter, 32)[0]) for codes in (wanted, scenes.codes))
    assert (edited.moved, edited.others) == (1.0, 1.0)
    assert edited.margin == pytest.approx(1.0, abs=1e-4)
    assert (untouched.moved, untouched.others) == (0.0, 1.0)
    assert untouched.margin == pytest.approx(-1.0, abs=1e-4)
    grey = judge(scenes, concept, torch.zeros(6, 3, 32, 32))
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
    edit = found[2].edit(6.0)
    assert sum(feature.weight**2 for feature in edit.features) == pytest.approx(1)
    assert edit.amount == 6.0
