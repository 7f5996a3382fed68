"""A run from a picture or from latents is that of diffusers' own pipelines, bit for bit: the draws in their order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from tests.parity.test_families import save
from tests.parity.test_schedulers import SERVED, scheduler
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.modules import Modules
from turbolens_server.engine.types import Guidance, Job, Start
from turbolens_server.loading.hub import embedded_model
from turbolens_server.loading.load import load_engine

PROMPT = "a big blue ring on the left, snow background"
FOLDERS = {
    "base": ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}),
    "ancestral": ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
    "DDIM": ("DDIM", {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}),
}


@pytest.fixture(scope="module", params=["mini", *FOLDERS])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "mini":
        return embedded_model()
    kind, settings = FOLDERS[request.param]
    return save(tmp_path_factory.mktemp("model"), kind, **settings)


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return load_engine(model=str(folder), max_steps=20)


@pytest.fixture(scope="module")
def pipeline(folder):
    return quiet(StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def a_picture(engine: Engine) -> np.ndarray:
    """Of smooth colors, at the engine's size."""
    height, width = engine.info.default_size
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    return (255 * np.stack([rows, columns, (rows + columns) / 2], 2)).astype(np.uint8)


def job(engine: Engine, start: Start, steps: int, strength: float, seed: int = 5, **more) -> Job:
    taken = int(steps * strength)
    return Job(PROMPT, seed, taken, *engine.info.default_size, start=start, skipped=steps - taken, **more)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("steps", "strength", "guided"), [(1, 1.0, False), (4, 0.5, True), (20, 0.3, False), (20, 0.95, False)]
)
def test_a_run_from_a_picture_is_the_pipelines(steps, strength, guided, engine, pipeline):
    pixels, guidance = a_picture(engine), Guidance(5.0, 0.5, "snow") if guided else None
    made = engine.run([job(engine, Start("picture", pixels), steps, strength, guidance=guidance)])
    told = guidance or Guidance(0.0)
    for form in ("latent", "np"):
        theirs = pipeline(
            PROMPT, image=Image.fromarray(pixels), strength=strength, num_inference_steps=steps, output_type=form,
            guidance_scale=told.scale, guidance_rescale=told.rescale, negative_prompt=told.negative_prompt,
            generator=generators(5),
        ).images  # fmt: skip
        if form == "latent":
            assert np.array_equal(made[0].latents, theirs[0].numpy())
        else:
            assert np.array_equal(made[0].picture, (theirs[0] * 255).round())


def test_so_is_one_from_latents_and_one_from_given_noise(engine, pipeline, folder):
    channels, height, width = 4, *(edge // engine.info.vae_downscale for edge in engine.info.default_size)
    values = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(1))
    (made,) = engine.run([job(engine, Start("latents", values.numpy()), 4, 0.75)])
    theirs = pipeline(
        PROMPT, image=values[None], strength=0.75, num_inference_steps=4, guidance_scale=0.0, output_type="latent",
        generator=generators(5),
    ).images  # fmt: skip
    assert np.array_equal(made.latents, theirs[0].numpy())
    (made,) = engine.run([job(engine, Start("noise", values.numpy()), 4, 1.0)])
    plain = quiet(StableDiffusionXLPipeline(**pipeline.components, add_watermarker=False))
    theirs = plain(
        PROMPT, latents=values[None].clone(), num_inference_steps=4, guidance_scale=0.0, output_type="latent",
        height=height * engine.info.vae_downscale, width=width * engine.info.vae_downscale, generator=generators(5),
    ).images  # fmt: skip
    assert np.array_equal(made.latents, theirs[0].numpy())


@pytest.fixture(scope="module")
def any_scheduler(tmp_path_factory: pytest.TempPathFactory):
    folder = save(tmp_path_factory.mktemp("model"), "EulerDiscrete", timestep_spacing="trailing")
    pipeline = quiet(StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32))
    return load_engine(model=str(folder)), pipeline


@pytest.mark.parametrize(("name", "settings"), [case[:2] for case in SERVED if case[0] != "IPNDMScheduler"])
def test_every_scheduler_starts_where_the_picture_is_noised_to(name, settings, any_scheduler):
    engine, pipeline = any_scheduler
    served = Engine(
        dataclasses.replace(engine.components, scheduler=scheduler(name, **settings)), engine.unet, engine.info,
        engine.device,
    )  # fmt: skip
    pipeline.scheduler = scheduler(name, **settings)
    start = Start("picture", a_picture(engine))
    made = served.run([job(engine, start, 4, 0.75, seed, picture=False) for seed in (3, 4)])
    theirs = pipeline(
        PROMPT, image=Image.fromarray(start.values), strength=0.75, num_inference_steps=4, guidance_scale=0.0,
        num_images_per_prompt=2, output_type="latent", generator=generators(3, 4),
    ).images  # fmt: skip
    assert np.array_equal(np.stack([one.latents for one in made]), theirs.numpy())


def test_a_vae_without_a_distribution_codes_too(any_scheduler):
    engine, pipeline = any_scheduler
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()  # fmt: skip
    read = dataclasses.replace(engine.components.modules.get(), vae=tiny)
    served = Engine(
        dataclasses.replace(engine.components, modules=Modules(lambda: read), decoder=tiny),
        engine.unet,
        engine.info,
        engine.device,
    )
    start = Start("picture", a_picture(engine))
    (made,) = served.run([job(engine, start, 4, 0.5)])
    own, pipeline.vae = pipeline.vae, tiny
    pipeline.scheduler = engine.components.scheduler
    theirs = pipeline(
        PROMPT, image=Image.fromarray(start.values), strength=0.5, num_inference_steps=4, guidance_scale=0.0,
        output_type="latent", generator=generators(5),
    ).images  # fmt: skip
    pipeline.vae = own
    assert np.array_equal(made.latents, theirs[0].numpy())
