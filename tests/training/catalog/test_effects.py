"""What adding features does, measured where the truth is known, on a model that obeys."""

from __future__ import annotations

import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_training.catalog import effects as module
from turbolens_training.catalog.effects import contrasts, measure_effects
from turbolens_training.catalog.labels import GroundTruth
from turbolens_training.measures.concepts import Concept, Scenes
from turbolens_training.measures.ranking import Active
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import Scene, Thing, encode_scenes, jitter_from_noise

CONCEPTS = {str(concept): concept for concept in Concept.all()}
BLUE = CONCEPTS["color=blue"]


def test_a_contrast_is_the_mean_where_the_value_is_less_the_mean_where_it_is_not() -> None:
    codes = encode_scenes([Scene((Thing(color=color),)) for color in ("blue", "red", "blue")])
    truth = GroundTruth(codes, torch.tensor([[0, 0, -1, -1]] * 3), (2, 2))  # the thing fills two of four cells
    cells, features = torch.tensor([0, 1, 2, 4, 9]), torch.tensor([1, 1, 1, 1, 0])
    active = Active(cells, features, torch.tensor([2.0, 4.0, 100.0, 1.0, 8.0]), 12)
    found = contrasts(active, truth, 3, [BLUE])
    assert found[BLUE].tolist() == pytest.approx([8 / 2 / 2, (2 + 4) / 2 / 2 - 1 / 2, 0])


def test_a_group_grows_by_what_moves_most_until_nothing_helps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two features together turn the thing blue; a third breaks the picture."""
    asked: list[set[int]] = []

    def obey(engine: Engine, scenes: Scenes, edit: object, batch: int) -> torch.Tensor:
        group = {feature.index for feature in edit.features}  # type: ignore[attr-defined]
        asked.append(group)
        codes, half = scenes.codes.clone(), len(scenes.codes) // 2
        codes[: half if 3 in group else 0, BLUE.column] = BLUE.code
        codes[half if 5 in group else len(codes) :, BLUE.column] = BLUE.code
        drawn = render(codes, jitter_from_noise(scenes.noise), 32)[0]
        return torch.zeros_like(drawn) if 7 in group else drawn

    monkeypatch.setattr(module, "generate", obey)
    name = "up.0.0"
    d_sae = engine.info.saes[name].bundle.d_sae
    contrast = torch.zeros(d_sae)
    contrast[[3, 5, 7]] = torch.tensor([1.0, 2.0, 3.0])
    found = measure_effects(engine, {name: {BLUE: contrast}}, [BLUE], scenes=8, batch=4, seed=0)
    by_rank = {effect.rank: (index, effect) for index, (effect,) in found[name].items()}
    assert {index for index, _ in by_rank.values()} == {3, 5}
    assert [by_rank[rank][1].moved for rank in (1, 2)] == [0.5, 1.0]
    assert {3, 5, 7} in asked
