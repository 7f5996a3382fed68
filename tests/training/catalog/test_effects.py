"""What adding features does, measured where the truth is known, on a model that obeys."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_training.catalog import effects as module
from turbolens_training.catalog.effects import contrasts, measure_effects, measure_icons
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


def test_an_icon_is_shown_at_the_least_strength_that_draws_something() -> None:
    """Feature 0 shows from 8 on, 1 never, 2 at once, 3 was never active, and 4 changes a single pixel."""
    tried: list[tuple[int, float]] = []

    def draw(job: Job) -> SimpleNamespace:
        (edit,) = job.edits
        (index,) = (feature.index for feature in edit.features)
        assert (job.prompt, job.seed, job.steps, edit.kind) == ("", 0, 1, "replace")
        tried.append((index, edit.amount))
        picture = np.full((16, 16, 3), 100, np.uint8)
        if edit.amount and {0: edit.amount >= 8, 2: True}.get(index):
            picture[4:8, 4:8, 1] = 200
        if edit.amount and index == 4:
            picture[0, 0] = 255
        return SimpleNamespace(picture=picture)

    bundle = SimpleNamespace(d_sae=5, stats=SimpleNamespace(mean=np.array([1.0, 1.0, 1.0, 0.0, 1.0])))
    model = SimpleNamespace(
        info=SimpleNamespace(saes={"mid.0": SimpleNamespace(bundle=bundle)}, default_size=(16, 16)),
        run=lambda jobs: [draw(job) for job in jobs],
    )
    assert measure_icons(model, "mid.0", 2) == {0: 8.0, 2: 4.0}  # type: ignore[arg-type]
    assert not {(3, 4.0), (2, 8.0), (0, 16.0)} & set(tried), "what shows, or never fires, is not tried on"
