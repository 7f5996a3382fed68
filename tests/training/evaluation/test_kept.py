"""A long evaluation that is cut short, and the ways of steering that the catalog's features give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_training.evaluation.edits import edit_pictures, transfer
from turbolens_training.evaluation.kept import KeptBatches
from turbolens_training.evaluation.named import known_features, named_methods, random_features
from turbolens_training.evaluation.pairs import EditScore, caption_pairs, draw_pairs
from turbolens_training.evaluation.sampling import saes_by_block
from turbolens_training.measures.concepts import Concept, pick_concepts


def test_what_a_run_made_before_it_was_cut_short_is_not_made_again(sae_engine: Engine, tmp_path: Path) -> None:
    pairs = caption_pairs(draw_pairs(sae_engine, pick_concepts(["color=blue"]), 4, "kept"))
    saes = saes_by_block(sae_engine)
    made = 0

    def method(m):
        nonlocal made
        made += 1
        if made == 2:
            raise KeyboardInterrupt
        return transfer(3, 1.0)(m)

    def run(kept: KeptBatches | None, method=method):
        return edit_pictures(sae_engine, saes, pairs, {"it": method}, steps=1, batch=2, title="test", kept=kept)

    with pytest.raises(KeyboardInterrupt):
        run(KeptBatches(tmp_path / "parts", "one"))
    whole, made = run(None, transfer(3, 1.0)), 10
    again = run(KeptBatches(tmp_path / "parts", "one"))
    assert made == 11  # the second batch alone
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    other = KeptBatches(tmp_path / "parts", "two")
    assert other.get(0) is None
    other.drop()
    assert not (tmp_path / "parts").exists()


def row(index: int, score: float, effects=()) -> dict:
    label = {"attribute": "color", "value": "blue", "region": "thing", "score": score}
    return {"index": index, "labels": [label], "sureness": 1.0, "effects": effects}


def effect(rank: int, moved: float) -> dict:
    return {"attribute": "color", "value": "blue", "rank": rank, "moved": moved, "others_right": 1.0}


def test_a_value_is_steered_by_its_measured_group_else_by_what_is_labelled_best(sae_engine: Engine) -> None:
    saes, blue = saes_by_block(sae_engine), pick_concepts(["color=blue"])[0]
    first, second = list(saes)[:2]
    labels = {first: [row(3, 0.9), row(4, 0.8), row(5, 0.7)], second: [row(9, 0.6)]}
    assert [(f.sae, f.index) for f in known_features(saes, labels, blue, 2)] == [(first, 3), (first, 4)]
    labels[second] = [row(9, 0.6, [effect(2, 0.9)]), row(8, 0.6, [effect(1, 0.5)])]
    assert [(f.sae, f.index) for f in known_features(saes, labels, blue, 2)] == [(second, 8), (second, 9)]
    assert known_features(saes, labels, pick_concepts(["color=red"])[0], 2) == ()


def test_each_picture_loses_its_own_value_and_gains_the_wanted_one(sae_engine: Engine) -> None:
    saes = saes_by_block(sae_engine)
    block = next(iter(saes))
    groups = draw_pairs(sae_engine, pick_concepts(["color=blue"]), 5, "named")
    every = [c for c in Concept.all() if c.attribute == "color"]
    labels = {block: [{**row(j, 0.9), "labels": [{"attribute": "color", "value": c.value, "score": 0.9}]}
                      for j, c in enumerate(every)]}  # fmt: skip
    methods = named_methods(saes, labels, groups, 1, (2.0,), 0)
    assert {name for name, _ in methods} == {"add", "set", "ablate and add", "replace", "add random"}

    class Some:
        rows = slice(1, 4)

    swapped = methods["ablate and add", 2.0](Some()).edits
    own = groups[0].scenes.codes[1:4, groups[0].concept.column].tolist()
    for (gone, added), code in zip(swapped, own, strict=True):
        assert (gone.kind, gone.amount, gone.features[0].index) == ("scale", 0.0, code)
        assert (added.kind, added.amount, added.features[0].index) == ("add", 2.0, groups[0].concept.code)
    found = random_features(saes, swapped[0][1].features, "x")
    assert len(found) == 1
    assert found != swapped[0][1].features
    assert found == random_features(saes, swapped[0][1].features, "x")


def test_intervals_narrow_with_pairs_and_unequal_parts_count_as_fewer() -> None:
    few, many = (EditScore(0, 0.5, 0, 1, n, float(n)) for n in (8, 80))
    assert few.interval(0.5)[0] < many.interval(0.5)[0] < 0.5
    both = EditScore.mean([few, many])
    assert both.pairs == 88
    assert both.counts_as == pytest.approx(4 / (1 / 8 + 1 / 80))
    assert EditScore.mean([few, few]).counts_as == pytest.approx(16)
