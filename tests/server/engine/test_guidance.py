"""Guidance: two lanes of one walk, what edits do on either side, and that mates notice nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.engine.batcher import Batcher, batch_key
from turbolens_server.engine.guidance import Sides, guide
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.types import Guidance, Job, NotFinite, Reference
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.twin import encode_dense
from turbolens_server.steering.edits import Condition, Edit, Unit, WeightedFeature
from turbolens_server.steering.kinds import KINDS

PROMPT, OTHER = "a big red star on the left, night background", "a big blue ring on the left, snow background"
NEGATIVE = "a small green ring on the left, night background"
GUIDANCE = Guidance(4.0, 0.3, NEGATIVE)
BLOCK = "up.0.1"


def job(*edits: Edit, prompt: str = PROMPT, seed: int = 7, guidance=GUIDANCE, **more) -> Job:
    return Job(prompt, seed, 2, 128, 128, edits=edits, guidance=guidance, **more)


def twin(cond: np.ndarray, uncond: np.ndarray, guidance: Guidance) -> np.ndarray:
    """One walk's predictions [C, h, w] in float64, number by number."""
    guided = np.array([u + guidance.scale * (c - u) for c, u in zip(cond.flat, uncond.flat, strict=True)])
    spread = lambda values: np.sqrt(((values - values.mean()) ** 2).sum() / (values.size - 1))  # noqa: E731
    whole = guided * spread(cond) / spread(guided)
    return (guidance.rescale * whole + (1 - guidance.rescale) * guided).reshape(cond.shape)


guidances = st.builds(Guidance, st.floats(1.0625, 100, width=32), st.sampled_from([0.0, 0.3, 1.0]))


@given(st.lists(st.none() | guidances, min_size=1, max_size=6), st.integers(0, 2**16))
def test_sides_split_and_join_each_walk_as_the_twin_does(guidance, seed):
    sides = Sides(guidance, torch.device("cpu"))
    rng = torch.Generator().manual_seed(seed)
    walks = torch.randn(len(guidance), 4, 3, 2, generator=rng)
    lanes = sides.split(walks)
    guided = [row for row, one in enumerate(guidance) if one is not None]
    assert torch.equal(lanes, torch.cat([walks, walks[guided]]))
    predicted = torch.randn(lanes.shape, generator=rng)
    joined = sides.join(predicted)
    assert joined.shape == walks.shape
    for row, one in enumerate(guidance):
        if one is None:
            assert torch.equal(joined[row], predicted[row])
            continue
        second = predicted[len(walks) + guided.index(row)]
        expected = twin(predicted[row].double().numpy(), second.double().numpy(), one)
        assert np.allclose(joined[row], expected, rtol=1e-4, atol=1e-3)


def test_what_is_led_away_from_itself_stays_where_it_is():
    one = torch.randn(2, 4, 8, 8)
    assert torch.allclose(guide(one, one, Guidance(7.5, 0.5)), one, atol=1e-5)


def test_rows_are_the_walks_and_then_the_second_lanes_of_the_guided():
    steered = job(references=(Reference("r", OTHER, 1),))
    lanes = Lanes.of([steered, job(guidance=None), job(seed=9)])
    assert [(lane.job, lane.prompt, lane.walk) for lane in lanes.rows] == [
        (0, PROMPT, 0), (1, PROMPT, 1), (2, PROMPT, 2), (0, OTHER, 3),
        (0, NEGATIVE, 0), (2, NEGATIVE, 2), (0, NEGATIVE, 3),
    ]  # fmt: skip
    assert lanes.seeds == (7, 7, 9, 1)
    assert lanes.second == {0: 4, 2: 5, 3: 6}
    assert (lanes.rows_of(0), lanes.rows_of(1), lanes.walks_of(0)) == ([0, 3, 4, 6], [1], [0, 3])
    assert (lanes.read_by(0), lanes.read_by(4)) == ({"r": 3}, {"r": 6})
    assert [one.lanes for one in (steered, job(guidance=None), job())] == [4, 1, 2]


def test_guided_and_plain_jobs_share_batches_which_count_lanes():
    jobs = [job(), job(guidance=None), job(seed=3)]
    assert len({batch_key(one) for one in jobs}) == 1
    batcher = Batcher(max_batch=4, wait_s=0)
    batcher.add("a", jobs)
    assert [slot.index for slot in batcher.take()] == [0, 1]
    assert [slot.index for slot in batcher.take()] == [2]


@pytest.fixture(scope="module", params=["torch", "onnx"])
def served(request, graph_cache):
    if request.param == "torch":
        return request.getfixturevalue("engine")
    return load_engine(backend="onnx", cache=graph_cache)


@pytest.fixture(scope="module")
def features(engine) -> tuple[WeightedFeature, ...]:
    """The strongest of a picture."""
    (result,) = engine.run([job(guidance=None, saes=(BLOCK,), picture=False)])
    codes = result.features[0]
    total = np.bincount(codes.indices, weights=codes.values, minlength=codes.d_sae)
    return tuple(WeightedFeature(BLOCK, int(i)) for i in total.argsort()[::-1][:4])


def passes(served, monkeypatch, one: Job) -> list[dict[str, torch.Tensor]]:
    """What each pass of the U-Net handed on, by lane, at the block of the edits: [lanes, P, d_model]."""
    seen, predict = [], served.unet.predict

    class Watching:
        def __init__(self, tap):
            self._tap, self.at, self.closed = tap, tap.at, tap.closed
            self.read, self.affine = tap.read, tap.affine

        def __call__(self, point, update, grid):
            steered = self._tap(point, update, grid)
            if point == BLOCK:
                seen.append((update.clone(), steered.clone()))
            return steered

    monkeypatch.setattr(served.unet, "predict", lambda s, t, c, tap: predict(s, t, c, Watching(tap)))
    served.run([one])
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("side", ["cond", "contrast", "both"])
@pytest.mark.parametrize("kind", ["add", "scale"])
def test_an_edit_moves_its_sides_as_the_twin_says(engine, features, kind, side, monkeypatch):
    amount = 3.0
    edit = Edit(kind, features, amount, Unit.RAW, side=side)
    seen = passes(engine, monkeypatch, job(edit))
    assert len(seen) == 2
    bundle = engine.info.saes[BLOCK].bundle
    W_dec = bundle.weights.W_dec.numpy()
    for update, steered in seen:
        for lane, sign in ((0, 1), (1, {"cond": 0, "contrast": -1, "both": 1}[side])):
            x, moved = update[lane].numpy(), update[lane].numpy().copy()
            z = encode_dense(bundle, update[lane]).numpy()
            for feature in features:
                change = amount if kind == "add" else (amount - 1) * z[:, feature.index, None]
                moved += sign * change * W_dec[feature.index]
            assert np.abs(steered[lane].numpy() - moved).max() <= 1e-4 * np.abs(moved).max()
            assert sign == 0 or np.abs(moved - x).max() > 0.1


def test_sides_are_steered_alike_on_every_backend(served, engine, features):
    """What the graph makes of sides, closed and open edits together, is what PyTorch makes."""
    edits = (
        Edit("add", features[:2], 2.0, side="contrast"),
        Edit("set", features[2:], 1.0, side="both", condition=Condition(features[0], "above", 0.0)),
        Edit("scale", features[:1], 0.0),
    )
    (found,) = served.run([job(*edits, saes=(BLOCK,))])
    (expected,) = engine.run([job(*edits, saes=(BLOCK,))])
    (plain,) = engine.run([job()])
    assert np.abs(found.latents - expected.latents).max() <= 2e-3 * np.abs(expected.latents).max()
    assert np.abs(plain.latents - expected.latents).max() > 0.05
    assert np.array_equal(found.features[0].counts, expected.features[0].counts)


@given(st.floats(-50, 50, width=32), st.sampled_from(["add", "scale"]))
def test_an_edits_opposite_moves_as_far_the_other_way(amount, kind):
    there, back = (KINDS[kind].own(a) + KINDS[kind].put(a) for a in (amount, KINDS[kind].opposite(amount)))
    assert there == pytest.approx(-back, abs=1e-4)
    assert Edit(kind, (), amount).opposite().opposite().amount == pytest.approx(amount, abs=1e-4)


def test_kinds_without_an_opposite_say_so():
    assert [kind for kind in KINDS if KINDS[kind].opposite is None] == ["set", "replace", "transfer", "patch"]
    with pytest.raises(ValueError, match="no opposite"):
        Edit("set", ()).opposite()


def test_both_sides_read_their_own_side_of_a_reference(engine):
    """Patched at every block on both sides, what is left of a run is its own spare blocks; on one side it is not."""
    points = tuple(point.name for point in engine.info.hook_points)
    same = (Reference("same", PROMPT, 7),)
    for side in ("cond", "both"):
        edit = Edit("patch", (), reference="same", points=points, side=side)
        (found,) = engine.run([job(edit, references=same)])
        (plain,) = engine.run([job()])
        assert np.abs(found.latents - plain.latents).max() <= 2e-3 * np.abs(plain.latents).max(), side


def test_features_are_those_of_the_side_with_the_prompt(engine, monkeypatch):
    seen = passes(engine, monkeypatch, job(Edit("add", (WeightedFeature(BLOCK, 0),), 0.0), saes=(BLOCK,)))
    (result,) = engine.run([job(saes=(BLOCK,))])
    for step, (update, _) in enumerate(seen):
        z = encode_dense(engine.info.saes[BLOCK].bundle, update[0]).numpy()
        assert np.array_equal(result.features[step].counts, (z > 0).sum(1))


def test_mates_keep_every_bit_beside_a_guided_job_steered_or_cancelled(engine, features):
    """In batches of as many lanes: beside two plain pictures, beside a guided one, and beside that one steered."""
    mates = [job(prompt=OTHER, seed=3, guidance=None), job(seed=4, guidance=None, saes=("mid.0",))]
    expected = engine.run([mates[0], job(guidance=None), mates[1], job(seed=8, guidance=None)])
    steered = job(Edit("add", features, 5.0, side="contrast"))
    batches = {
        "guided": engine.run([mates[0], job(), mates[1]]),
        "steered": engine.run([mates[0], steered, mates[1]]),
        "cancelled": engine.run([mates[0], steered, mates[1]], cancelled=lambda at: at == 1),
    }
    assert not np.array_equal(batches["guided"][1].latents, batches["steered"][1].latents)
    assert batches["cancelled"][1] is None
    for name, results in batches.items():
        for at in (0, 2):
            assert np.array_equal(results[at].latents, expected[at].latents), name
            assert np.array_equal(results[at].picture, expected[at].picture), name
        for ours, theirs in zip(results[2].features, expected[2].features, strict=True):
            assert np.array_equal(ours.values, theirs.values), name


def test_jobs_of_several_guidances_each_keep_their_own(engine):
    several = [Guidance(3.0), Guidance(6.0, 0.5), Guidance(3.0, negative_prompt=OTHER), Guidance(3.0)]
    together = engine.run([job(guidance=one, seed=at) for at, one in enumerate(several)])
    for at, one in enumerate(several):
        (alone,) = engine.run([job(guidance=one, seed=at)])
        assert np.abs(together[at].latents - alone.latents).max() <= 2e-3 * np.abs(alone.latents).max()


def test_a_second_lane_that_is_not_finite_ends_its_own_job_alone(engine, monkeypatch):
    predict = engine.unet.predict

    def broken(sample, *rest):
        prediction = predict(sample, *rest)
        prediction[2] = float("nan")  # the first job's lane without the prompt
        return prediction

    monkeypatch.setattr(engine.unet, "predict", broken)
    told = []
    denoised = engine.denoise([job(), job(seed=8)], on_event=told.append)
    assert [event.job for event in told if isinstance(event, NotFinite)] == [0]
    assert denoised.live == [False, True]


def test_a_long_negative_prompt_is_counted_too(engine):
    long = dataclasses.replace(GUIDANCE, negative_prompt="snow " * 200)
    (result,) = engine.run([job(guidance=long)])
    assert result.tokens_cut > 100
