"""Jobs of several lanes: what an edit takes from a reference run, in one batch and one pass a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.types import Job, NotFinite, Reference
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.twin import encode_dense
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask
from turbolens_training.evaluation.sampling import sample

PROMPT, OTHER = "a big red star on the left, night background", "a big blue ring on the left, snow background"
LEFT = BoxMask((Box(0, 0, 0.5, 1),))
CLOSE = 2e-3  # of the largest latent: a batch of another size rounds differently


def job(*edits: Edit, prompt: str = PROMPT, seed: int = 7, steps: int = 2, **more) -> Job:
    named = sorted({edit.reference for edit in edits} - {None})
    references = tuple(Reference(name, OTHER if name == "other" else PROMPT, seed) for name in named)
    return Job(prompt, seed, steps, 128, 128, edits=edits, references=references, **more)


def patch(*points: str, **more) -> Edit:
    return Edit("patch", (), reference="other", points=points, **more)


def features(engine, block: str, n: int = 6) -> tuple[WeightedFeature, ...]:
    """The block's strongest features in the reference run."""
    (result,) = engine.run([Job(OTHER, 7, 1, 128, 128, saes=(block,), picture=False)])
    (codes,) = result.features
    total = np.bincount(codes.indices, weights=codes.values, minlength=codes.d_sae)
    return tuple(WeightedFeature(block, int(i), 1.0 - 0.1 * at) for at, i in enumerate(total.argsort()[::-1][:n]))


@pytest.fixture(scope="module", params=["torch", "onnx"])
def served(request, graph_cache):
    if request.param == "torch":
        return request.getfixturevalue("engine")
    return load_engine(backend="onnx", cache=graph_cache)


def two_runs(engine, twin, steps: int = 2) -> np.ndarray:
    """Latents by two runs, one after the other: `twin(step, point, x, x_r)` on the second, in NumPy."""
    other = sample(engine, [OTHER], [7], steps, keep=True).updates

    def intervene(step, point, update):
        moved = twin(point, update[0].float().numpy(), other[point][step, 0].numpy())
        return update if moved is None else torch.from_numpy(moved)[None]

    return sample(engine, [PROMPT], [7], steps, intervene=intervene).latents.numpy()[0]


def close(found, expected) -> bool:
    return np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def mask_of(point, positions) -> np.ndarray:
    edge = int(positions**0.5)
    return LEFT.on_grid(edge, edge).reshape(-1, 1)


def test_a_patch_is_the_reference_runs_update_where_its_mask_is(served):
    points = ("up.0.0", "up.0.1")

    def twin(point, x, x_r):
        m = mask_of(point, len(x))
        return (1 - m) * x + m * x_r if point in points else None

    (found,) = served.run([job(patch(*points, mask=LEFT))])
    (plain,) = served.run([job()])
    assert close(found.latents, two_runs(served, twin))
    assert not close(found.latents, plain.latents)


def test_all_of_it_patched_is_the_reference_runs_own_picture_as_far_as_the_blocks_carry_it(engine):
    """mini's captions reach the picture by its hook points and two spare blocks: patched, the other thing is drawn."""
    (found,) = engine.run([job(patch(*(point.name for point in engine.info.hook_points)), steps=1)])
    (other,) = engine.run([job(prompt=OTHER, steps=1)])
    (plain,) = engine.run([job(steps=1)])
    assert np.abs(found.latents - other.latents).mean() < 0.3 * np.abs(plain.latents - other.latents).mean()


@pytest.mark.parametrize("kind", ["transfer", "add", "set"])
def test_what_is_transferred_is_the_reference_runs_activation_at_each_position_and_step(served, kind):
    block, multiplier = "up.0.0", 1.5
    chosen = features(served, block)
    bundle = served.info.saes[block].bundle
    W_dec = bundle.weights.W_dec.numpy()

    def twin(point, x, x_r):
        if point != block:
            return None
        z, z_r = (encode_dense(bundle, torch.from_numpy(y)).numpy() for y in (x, x_r))
        m, moved = mask_of(point, len(x)), x.copy()
        for feature in chosen:
            put = multiplier * feature.weight * z_r[:, feature.index, None]
            taken = 0 if kind == "add" else z[:, feature.index, None]
            moved += m * (put - taken) * W_dec[feature.index]
        return moved

    edit = Edit(kind, chosen, multiplier, Unit.REFERENCE, LEFT, reference="other")
    (found,) = served.run([job(edit)])
    (plain,) = served.run([job()])
    assert close(found.latents, two_runs(served, twin))
    assert not close(found.latents, plain.latents)


def test_both_lanes_take_one_pass_a_step(engine, monkeypatch):
    passes = []
    predict = engine.unet.predict
    monkeypatch.setattr(
        engine.unet, "predict", lambda sample, *rest: passes.append(len(sample)) or predict(sample, *rest)
    )
    engine.run([job(patch("up.0.0"), Edit("transfer", features(engine, "up.0.1"), 1.0, reference="other")), job()])
    assert passes[-2:] == [3, 3]


def test_a_run_of_the_pictures_own_prompt_changes_nothing_it_is_patched_with(engine):
    same = (Reference("same", PROMPT, 7),)
    edit = Edit("patch", (), reference="same", points=("up.0.0", "mid.0"))
    (found,) = engine.run([Job(PROMPT, 7, 2, 128, 128, edits=(edit,), references=same)])
    (plain,) = engine.run([job()])
    assert close(found.latents, plain.latents)


def test_mates_keep_every_bit_whether_a_job_of_lanes_is_steered_or_cancelled(engine):
    steered = job(patch("up.0.1"), Edit("transfer", features(engine, "up.0.0"), 1.0, reference="other"))
    plain = Job(PROMPT, 7, 2, 128, 128, references=steered.references)
    mates = [job(prompt=OTHER, seed=3), job(seed=4, saes=("mid.0",))]
    expected = engine.run([mates[0], plain, mates[1]])
    cancelled = engine.run([mates[0], steered, mates[1]], cancelled=lambda at: at == 1)
    found = engine.run([mates[0], steered, mates[1]])
    assert cancelled[1] is None
    assert not np.array_equal(found[1].latents, expected[1].latents)
    for results in (found, cancelled):
        for at in (0, 2):
            assert np.array_equal(results[at].latents, expected[at].latents)
            assert np.array_equal(results[at].picture, expected[at].picture)
            for ours, theirs in zip(results[at].features, expected[at].features, strict=True):
                assert np.array_equal(ours.values, theirs.values)


def test_a_reference_run_that_is_not_finite_ends_its_own_job_alone(engine, monkeypatch):
    predict = engine.unet.predict

    def broken(sample, *rest):
        prediction = predict(sample, *rest)
        prediction[2] = float("nan")  # the lane of the first job's reference
        return prediction

    monkeypatch.setattr(engine.unet, "predict", broken)
    told = []
    denoised = engine.denoise([job(patch("up.0.0")), job(seed=8)], on_event=told.append)
    assert [event.job for event in told if isinstance(event, NotFinite)] == [0]
    assert denoised.live == [False, True]


def test_rows_are_the_pictures_first_and_then_their_references():
    lanes = Lanes.of([job(patch("mid.0")), job(), job(patch("mid.0"), Edit("add", (), reference="same"))])
    assert [(lane.job, lane.prompt == OTHER) for lane in lanes.rows] == [
        (0, False), (1, False), (2, False), (0, True), (2, True), (2, False),
    ]  # fmt: skip
    assert lanes.references == ({"other": 3}, {}, {"other": 4, "same": 5})
    assert lanes.rows_of(2) == [2, 4, 5]
