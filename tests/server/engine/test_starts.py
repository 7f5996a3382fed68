"""Jobs that start from pictures: which of them run together, and that mates notice nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbolens_server.engine.batcher import batch_key
from turbolens_server.engine.encode import PictureEncoder
from turbolens_server.engine.types import Job, Reference, Start
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.edits import Edit, WeightedFeature

PROMPT = "a big red star on the left, night background"


@pytest.fixture(scope="module")
def picture(engine) -> np.ndarray:
    return engine.run([Job("a big blue ring, snow background", 3, 1, 128, 128)])[0].picture


def job(start=None, *edits, seed=7, steps=2, skipped=0, **more) -> Job:
    return Job(PROMPT, seed, steps, 128, 128, edits=edits, start=start, skipped=skipped, **more)


def test_only_what_walks_the_same_steps_runs_together(picture):
    start = Start("picture", picture)
    assert batch_key(job(start, skipped=2)) == batch_key(job(Start("latents", picture), skipped=2, seed=9))
    assert len({batch_key(one) for one in (job(), job(start), job(start, skipped=2), job(start, skipped=1))}) == 3


def test_little_strength_keeps_the_picture_and_much_of_it_does_not(engine, picture):
    start = Start("picture", picture)
    apart = [
        np.abs(engine.run([job(start, steps=taken, skipped=4 - taken)])[0].picture - picture.astype(float)).mean()
        for taken in (1, 2, 4)
    ]
    assert apart == sorted(apart)
    assert apart[0] < 0.5 * apart[2]


def test_mates_of_a_job_from_a_picture_keep_every_bit(engine, picture):
    mates = [job(seed=3), job(seed=4, saes=("mid.0",))]
    expected = engine.run([mates[0], job(), mates[1]])
    steered = job(Start("picture", picture), Edit("add", (WeightedFeature("up.0.1", 202),), 5.0))
    for middle in (job(Start("picture", picture)), steered, job(Start("noise", np.ones((4, 32, 32), np.float32)))):
        found = engine.run([mates[0], middle, mates[1]])
        for at in (0, 2):
            assert np.array_equal(found[at].latents, expected[at].latents)
            assert np.array_equal(found[at].picture, expected[at].picture)
        assert not np.array_equal(found[1].latents, expected[1].latents)


def test_a_reference_of_the_same_picture_and_prompt_changes_nothing_it_is_patched_with(engine, picture):
    start = Start("picture", picture)
    edit = Edit("patch", (), reference="same", points=("up.0.0", "mid.0"))
    (found,) = engine.run([job(start, edit, skipped=2, references=(Reference("same", PROMPT, 7, start),))])
    (plain,) = engine.run([job(start, skipped=2)])
    assert np.abs(found.latents - plain.latents).max() <= 2e-3 * np.abs(plain.latents).max()


def test_every_backend_walks_from_a_picture(engine, picture, graph_cache):
    pytest.importorskip("onnxruntime")
    one = job(Start("picture", picture), skipped=2, saes=("up.0.1",))
    (found,), (expected,) = load_engine(backend="onnx", cache=graph_cache).run([one]), engine.run([one])
    assert np.abs(found.latents - expected.latents).max() <= 2e-3 * np.abs(expected.latents).max()


def test_in_half_precision_the_encoder_is_a_copy_in_full_and_the_vae_is_left_alone(engine, picture):
    vae = engine.components.vae
    import copy

    half = copy.deepcopy(vae).half()
    half.register_to_config(force_upcast=True)
    encoder = PictureEncoder(half)
    coded = encoder.distribution(picture, torch.float32).mean
    assert encoder.own_weights
    assert (half.dtype, coded.dtype) == (torch.float16, torch.float32)
    assert hasattr(half.decoder, "conv_in")
    exact = PictureEncoder(vae).distribution(picture, torch.float32).mean
    assert (coded - exact).abs().max() <= 2e-2 * exact.abs().max()
    assert not PictureEncoder(vae).own_weights
