"""Sizes beside the model's own, square or not: each is that of diffusers' pipeline, and batches are of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

import turbolens as tl
from turbolens_server.embedded import start
from turbolens_server.engine.batcher import batch_key
from turbolens_server.engine.types import Guidance, Job, Start
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hub import embedded_model
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.edits import Edit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask

PROMPT, SIZES = "a big red star on the left, night background", ("160x96", "96x160")


@pytest.fixture(scope="module")
def several():
    return load_engine(more_sizes=SIZES)


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionXLPipeline.from_pretrained(embedded_model(), torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(("width", "height"), [(160, 96), (96, 160), (128, 128)])
@pytest.mark.parametrize("guidance", [None, Guidance(4.0)], ids=["plain", "guided"])
def test_a_picture_of_any_size_is_the_pipelines(width, height, guidance, several, pipeline):
    (made,) = several.run([Job(PROMPT, 7, 2, height, width, guidance=guidance)])
    settings = {
        "num_inference_steps": 2, "guidance_scale": guidance.scale if guidance else 0.0, "height": height,
        "width": width, "generator": torch.Generator().manual_seed(7),
    }  # fmt: skip
    theirs = pipeline(PROMPT, **settings, output_type="np").images[0]
    assert made.picture.shape == (height, width, 3)
    assert np.array_equal(made.picture, (theirs * 255).round())


def test_so_is_one_from_a_picture(several, pipeline):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 160, 3), dtype=np.uint8)
    (made,) = several.run([Job(PROMPT, 7, 2, 96, 160, start=Start("picture", pixels), skipped=2)])
    from_picture = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    from_picture.set_progress_bar_config(disable=True)
    theirs = from_picture(
        PROMPT, image=Image.fromarray(pixels), strength=0.5, num_inference_steps=4, guidance_scale=0.0,
        output_type="latent", generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert np.array_equal(made.latents, theirs.numpy())


def test_features_and_edits_have_the_grid_of_their_size(several, graph_cache):
    """The left half of a wide grid is steered, on every backend, and features are those of each position."""
    pytest.importorskip("onnxruntime")
    edit = Edit("add", (WeightedFeature("up.0.1", 202),), 8.0, mask=BoxMask((Box(0, 0, 0.5, 1),)))
    job = Job(PROMPT, 7, 1, 96, 160, edits=(edit,), saes=("up.0.1",))
    (found,) = several.run([job])
    (other,) = load_engine(more_sizes=SIZES, backend="onnx", cache=graph_cache).run([job])
    (plain,) = several.run([Job(PROMPT, 7, 1, 96, 160)])
    codes = found.features[0]
    assert (codes.height, codes.width, len(codes.counts)) == (6, 10, 60)
    assert np.abs(found.latents - other.latents).max() <= 2e-3 * np.abs(found.latents).max()
    moved = np.abs(found.picture.astype(int) - plain.picture).mean((0, 2))
    assert moved[:70].mean() > 2 * moved[90:].mean()


def test_batches_are_of_one_size(several):
    jobs = [Job(PROMPT, 7, 1, *size) for size in several.info.sizes]
    assert len({batch_key(job) for job in jobs}) == 3
    with pytest.raises(ValueError, match="share steps, height, width"):
        several.run(jobs[:2])


def test_callers_are_told_the_sizes_and_get_the_one_they_ask_for():
    with start(more_sizes=SIZES, warm_up=False) as server, tl.connect(server.target) as lens:
        model = lens.model()
        assert [(size.width, size.height) for size in model.limits.sizes] == [(128, 128), (160, 96), (96, 160)]
        wide = lens.generate(PROMPT, seed=7, width=160, height=96)
        assert wide.array.shape == (96, 160, 3)
        again = lens.generate(PROMPT, seed=7, image=wide, strength=0.5, steps=2)
        assert again.array.shape == (96, 160, 3)
        with pytest.raises(tl.InvalidRequest, match="128x128, 160x96, 96x160"):
            lens.generate(PROMPT, seed=7, width=160)


@pytest.mark.parametrize(
    ("size", "says"),
    [("160", "write WIDTHxHEIGHT"), ("160x90", "multiples of 16"), ("16x160", "from 32"), ("x", "write")],
)
def test_a_size_that_the_model_cannot_halve_is_refused(size, says):
    with pytest.raises(LoadError, match=says):
        load_engine(more_sizes=(size,))
