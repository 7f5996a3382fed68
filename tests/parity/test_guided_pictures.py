"""A guided picture is the picture of diffusers' own pipeline on the same folder, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from tests.parity.test_families import save
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Guidance, Job
from turbolens_server.loading.hub import embedded_model
from turbolens_server.loading.load import load_engine

PROMPT = "a big red star on the left, night background"
FOLDERS = {
    # Scheduler and its settings, and whether nothing is heard as zeros.
    "base": ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, True),
    "base, ancestral": ("EulerAncestralDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, True),
    "DDIM": ("DDIM", {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}, False),
    "DPM++": ("DPMSolverMultistep", {"timestep_spacing": "trailing"}, True),
    "v-prediction": ("DDIM", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
                              "prediction_type": "v_prediction"}, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    @functools.cache
    def of(name: str) -> Path:
        if name == "mini":
            return embedded_model()
        scheduler, settings, zeros = FOLDERS[name]
        made = save(tmp_path_factory.mktemp("model"), scheduler, **settings)
        index = made / "model_index.json"
        index.write_text(index.read_text().replace(
            '"force_zeros_for_empty_prompt": true', f'"force_zeros_for_empty_prompt": {str(zeros).lower()}'
        ))  # fmt: skip
        return made

    return of


@pytest.fixture(scope="module")
def engine_of(folder):
    return functools.cache(lambda name: load_engine(model=str(folder(name)), max_steps=20))


@pytest.fixture(scope="module")
def pipeline_of(folder):
    @functools.cache
    def load(name: str) -> StableDiffusionXLPipeline:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder(name), torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def hold_equal(engine: Engine, pipeline, steps: int, guidance: Guidance, seeds=(3,)) -> None:
    """Latents and pictures, to the last bit."""
    height, width = engine.info.default_size
    made = engine.run([Job(PROMPT, seed, steps, height, width, guidance=guidance) for seed in seeds])
    for form in ("latent", "np"):
        theirs = pipeline(
            PROMPT, num_inference_steps=steps, height=height, width=width, num_images_per_prompt=len(seeds),
            guidance_scale=guidance.scale, guidance_rescale=guidance.rescale, negative_prompt=guidance.negative_prompt,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type=form,
        ).images  # fmt: skip
        if form == "latent":
            assert np.array_equal(np.stack([result.latents for result in made]), theirs.numpy())
        else:
            assert np.array_equal(np.stack([result.picture for result in made]), (theirs * 255).round())


CASES = [(name, steps) for name in ("mini", "base", "DDIM") for steps in (1, 4, 20)]
CASES += [("base, ancestral", 4), ("DPM++", 4), ("v-prediction", 4)]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_a_guided_picture_is_the_pipelines(name, steps, engine_of, pipeline_of):
    for guidance in (Guidance(5.0), Guidance(7.3, negative_prompt="a blue ring", rescale=0.7)):
        hold_equal(engine_of(name), pipeline_of(name), steps, guidance)


@pytest.mark.parametrize("name", ["mini", "base"])
def test_so_are_several_in_one_batch(name, engine_of, pipeline_of):
    hold_equal(engine_of(name), pipeline_of(name), 4, Guidance(3.0, negative_prompt=""), seeds=(3, 4))
