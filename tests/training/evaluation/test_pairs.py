from __future__ import annotations

import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_training.evaluation.config import EvalConfig
from turbolens_training.evaluation.edits import NOTHING, PROMPT, Material, edit_pictures, patch
from turbolens_training.evaluation.interventions import zero
from turbolens_training.evaluation.pairs import Group, caption_pairs, draw_pairs, score_edits, split
from turbolens_training.evaluation.sampling import saes_by_block, sample
from turbolens_training.evaluation.scene_edit import (
    Cell,
    best_labelled,
    labelled_directions,
    mean_directions,
    push,
    with_series,
)
from turbolens_training.evaluation.transfer import EncodedPictures
from turbolens_training.measures.concepts import pick_concepts

NAMES = ("color=blue", "background=night", "position=left")


@pytest.fixture(scope="module")
def groups(tiny_engine: Engine) -> list[Group]:
    return draw_pairs(tiny_engine, pick_concepts(NAMES), 2, "test")


def test_the_captions_of_a_pair_differ_in_the_attribute_alone(groups: list[Group]) -> None:
    pairs = caption_pairs(groups)
    assert len(pairs) == 6
    for group, rows in split(groups, torch.arange(6)):
        assert (group.target != group.scenes.codes).sum(1).tolist() == [1, 1]
        for row in rows.tolist():
            before, after = pairs.captions[row].split(), pairs.edited[row].split()
            if group.concept.attribute != "position":  # "in the center" and "on the left" differ in two words
                assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
            assert group.concept.value in pairs.edited[row]


def test_scores_know_the_source_the_target_and_what_lies_between(groups: list[Group]) -> None:
    exact = [group.exact(32) for group in groups]
    source, target = (torch.cat(pictures) for pictures in zip(*exact, strict=True))
    start, end = score_edits(groups, source)["all"], score_edits(groups, target)["all"]
    assert (start.nearer, start.others, end.nearer, end.others) == (0.0, 1.0, 1.0, 1.0)
    assert start.progress == pytest.approx(0, abs=1e-4)
    assert end.progress == pytest.approx(1, abs=1e-4)
    assert end.psnr > 90
    for share in (0.25, 0.75):
        between = score_edits(groups, source + share * (target - source))
        assert all(score.progress == pytest.approx(share, abs=1e-4) for score in between.values())
        assert between["all"].nearer == float(share > 0.5)
    # A change in a random direction goes nowhere, and costs as much.
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    astray = score_edits(groups, source + noise * (target - source).square().mean().sqrt())["all"]
    assert abs(astray.progress) < 0.1
    assert astray.psnr < start.psnr


def test_methods_are_run_on_the_right_pictures(sae_engine: Engine, groups: list[Group]) -> None:
    """Patching nothing gives the base, whatever the batches; the last one is smaller."""
    pairs, saes = caption_pairs(groups), saes_by_block(sae_engine)
    methods = {"own": lambda m: zero(()), "other": patch([point.name for point in sae_engine.info.hook_points])}
    found = edit_pictures(sae_engine, saes, pairs, methods, steps=1, batch=4, title="test")
    base = sample(sae_engine, pairs.captions, pairs.seeds, 1).latents
    wanted = sample(sae_engine, pairs.edited, pairs.seeds, 1).latents
    for name, expected in ((NOTHING, base), ("own", base), (PROMPT, wanted)):
        assert torch.allclose(found[name], expected, atol=1e-4)
    assert not torch.allclose(found["other"], base, atol=1e-3)


def test_the_best_labelled_feature_is_pushed_in_its_own_pairs_only(sae_engine: Engine, groups: list[Group]) -> None:
    def row(index: int, value: str, score: float) -> dict:
        label = {"attribute": "color", "value": value, "region": "thing", "score": score}
        return {"index": index, "labels": [label], "sureness": 0.5}

    labels = {"mid.0": [row(3, "blue", 0.8), row(4, "red", 0.99)], "up.0.1": [row(9, "blue", 0.9)]}
    blue = pick_concepts(["color=blue"])[0]
    assert best_labelled(labels, blue) == ("up.0.1", 9)
    assert best_labelled({"mid.0": []}, blue) is None
    saes = saes_by_block(sae_engine)
    directions = labelled_directions(saes, groups, labels)
    rows = torch.tensor([g.concept == blue for g in groups for _ in g.scenes.seeds])
    assert rows.sum() == 2
    stats = saes["up.0.1"].bundle.stats
    assert stats is not None
    assert torch.equal(directions["up.0.1"][rows], (float(stats.mean[9]) * saes["up.0.1"].W_dec[9]).expand(2, -1))
    assert all((d[~rows] == 0).all() for d in directions.values())
    assert (directions["mid.0"] == 0).all()


def test_mean_directions_are_those_of_each_concept(sae_engine: Engine, groups: list[Group]) -> None:
    saes = saes_by_block(sae_engine)
    choice = draw_pairs(sae_engine, [group.concept for group in groups], 1, "choice")
    directions = mean_directions(sae_engine, saes, groups, choice, EvalConfig(steps=2, batch=2))
    pairs = caption_pairs([choice[1]])
    runs = [sample(sae_engine, captions, pairs.seeds, 2, keep=True) for captions in (pairs.captions, pairs.edited)]
    for block, found in directions.items():
        expected = (runs[1].updates[block] - runs[0].updates[block]).mean((1, 2))  # [T, d_model]
        assert torch.allclose(found[:, 2:4], expected[:, None].expand(-1, 2, -1), atol=1e-4)


def test_a_push_is_a_direction_times_its_strength_in_the_batchs_rows() -> None:
    directions = torch.arange(12.0).reshape(1, 4, 3)  # [1, N, d_model]
    updates = torch.ones(2, 2, 5, 3)
    run = EncodedPictures({"mid.0": updates}, {}, {})
    intervene = push({"mid.0": directions}, 2.0)(Material({}, slice(1, 3), run, run))
    for step in range(2):
        moved = intervene(step, "mid.0", updates[step])
        assert torch.equal(moved, 1 + 2 * directions[0, 1:3, None].expand(-1, 5, -1))
    assert torch.equal(intervene(0, "up.0.0", updates[0]), updates[0])


def test_cells_are_called_by_their_settings() -> None:
    assert str(Cell("transfer", 64, 1.5)) == "transfer 64 x1.5"
    assert str(Cell("patch")) == "patch"


def test_unknown_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match="no such concept: color=plaid"):
        pick_concepts(["color=plaid"])


def test_a_curve_is_over_features_where_a_method_counts_them() -> None:
    rows = [{"method": "transfer", "features": n, "multiplier": m} for n in (4, 16) for m in (1.0, 2.0)]
    rows += [{"method": "add one labelled", "features": "", "multiplier": m} for m in (4.0, 8.0)]
    series = [row["series"] for row in with_series(rows)]
    assert series == ["transfer x1", "transfer x2"] * 2 + ["add one labelled"] * 2
