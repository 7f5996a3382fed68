"""Every scheduler that is served walks as in diffusers' own pipeline, bit for bit; others are refused with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from tests.conftest import save_random_model
from turbolens_server.config import ConfigError, ServerConfig, read_config
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.sampler import Sampler, UnsupportedScheduler, check_scheduler
from turbolens_server.engine.types import Job, StepDone
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.serving import load_from
from turbolens_training.mini import model as parts

PROMPTS, SEEDS, SIZE = ("a star", "two"), (3, 4), 64
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
ENDS_ABOVE_ZERO = {"final_sigmas_type": "sigma_min"}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}

SERVED = [
    ("DDIMScheduler", {}, True),
    ("DDPMScheduler", {}, True),
    ("DEISMultistepScheduler", {}, False),
    ("DPMSolverMultistepScheduler", {}, True),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, True),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **ENDS_ABOVE_ZERO}, False),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, True),
    ("EDMDPMSolverMultistepScheduler", EDM, True),
    ("EDMEulerScheduler", EDM, True),
    ("EulerAncestralDiscreteScheduler", {}, True),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, True),
    ("IPNDMScheduler", {}, False),
    ("LCMScheduler", {}, True),
    ("LMSDiscreteScheduler", {}, True),
    ("SASolverScheduler", {}, True),
    ("TCDScheduler", {}, False),
    ("UniPCMultistepScheduler", {}, True),
]
"""Scheduler, settings beside the model's own noise levels, and whether it has an estimate to preview."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    changes = {"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1),
               "attention_head_dim": (2, 2), "layers_per_block": 1, "sample_size": SIZE // 8}  # fmt: skip
    unet = UNet2DConditionModel.from_config({**parts.build_unet().config, **changes})
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, unet, EulerDiscreteScheduler(**LEVELS))
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return load_engine(model=str(model))


def of_pipeline(pipeline, steps: int, **more) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"guidance_scale": 0.0, "num_inference_steps": steps, "height": SIZE, "width": SIZE, **more}
    return pipeline(list(PROMPTS), generator=generators, output_type="latent", **settings).images


def of_engine(engine: Engine, steps: int, **more) -> torch.Tensor:
    pairs = zip(PROMPTS, SEEDS, strict=True)
    jobs = [Job(prompt, seed, steps, SIZE, SIZE, picture=False, **more) for prompt, seed in pairs]
    return torch.stack([torch.from_numpy(result.latents) for result in engine.run(jobs)])


def scheduler(name: str, **settings):
    """A scheduler with the model's noise levels, as far as it has such settings."""
    kind = getattr(diffusers, name)
    return kind.from_config(
        {key: value for key, value in {**LEVELS, **settings}.items() if key in kind._get_init_keys(kind)}
    )


@pytest.mark.parametrize(("name", "settings", "previews"), SERVED)
def test_a_walk_is_the_pipelines(name, settings, previews, engine, pipeline):
    own = scheduler(name, **settings)
    assert check_scheduler(own, 4).previews == previews
    info = dataclasses.replace(engine.info, previews=previews)
    served = Engine(dataclasses.replace(engine.components, scheduler=own), engine.unet, info, engine.device)
    pipeline.scheduler = scheduler(name, **settings)
    for steps in (1, 4):
        assert torch.equal(of_engine(served, steps), of_pipeline(pipeline, steps)), steps
    told = []
    served.run([Job("x", 0, 3, SIZE, SIZE, previews=True)], on_event=told.append)
    shown = [event.preview is not None for event in told if isinstance(event, StepDone)]
    assert shown == [previews, previews, False]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("HeunDiscreteScheduler", {}, "takes 3 passes of the U-Net for 2 steps; lower --max-steps to 1 or use "
                                      "--scheduler EulerDiscreteScheduler"),
        ("KDPM2DiscreteScheduler", {}, "takes 3 passes of the U-Net for 2 steps"),
        ("KDPM2AncestralDiscreteScheduler", {}, "or use --scheduler EulerAncestralDiscreteScheduler"),
        ("PNDMScheduler", {"skip_prk_steps": True}, "takes 3 passes of the U-Net for 2 steps.*DDIMScheduler"),
        ("PNDMScheduler", {}, "cannot take 1 step.*; use --scheduler DDIMScheduler"),
        ("DDIMInverseScheduler", {}, "goes from pictures to noise"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "values that are not finite in 1 step"),
    ],
)  # fmt: skip
def test_what_is_no_pass_a_step_is_refused_by_that_reason(name, settings, says):
    with pytest.raises(UnsupportedScheduler, match=f"scheduler {name} .*{says}"):
        check_scheduler(scheduler(name, **settings), 4)


@pytest.mark.parametrize(
    ("asked", "name"),
    [("LCM", "LCMScheduler"), ("EulerAncestral", "EulerAncestralDiscreteScheduler"), ("TCDScheduler", "TCDScheduler")],
)
def test_another_scheduler_is_a_flag(asked, name, model, engine, pipeline):
    served = load_from(read_config(["--model", str(model), "--scheduler", asked, "--timestep-spacing", "leading"], {}))
    config = {**EulerDiscreteScheduler.load_config(model / "scheduler"), "timestep_spacing": "leading"}
    pipeline.scheduler = getattr(diffusers, name).from_config(config)
    assert torch.equal(of_engine(served, 2), of_pipeline(pipeline, 2))
    assert (served.info.scheduler, served.info.timestep_spacing) == (name, "leading")
    assert served.info.model_hash == engine.info.model_hash
    assert served.info.components_hash != engine.info.components_hash


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--scheduler", "Nonsense"], "--scheduler Nonsense: diffusers has no such scheduler"),
        (["--scheduler", "EDMEuler"], "--scheduler EDMEulerScheduler: cannot be made of the model's settings"),
        (["--scheduler", "IPNDM", "--timestep-spacing", "leading"], "IPNDMScheduler has no spacing"),
        (["--scheduler", "UniPC", "--timesteps", "399"], "UniPCMultistepScheduler chooses its own"),
        (["--scheduler", "LCM", "--timesteps", "1000"], "cannot take 1 step"),
        (["--scheduler", "LCM", "--timesteps", "900", "800", "700", "600", "500"], "raise --max-steps"),
    ],
)
def test_a_scheduler_that_cannot_be_had_is_refused(argv, says, model):
    with pytest.raises(LoadError, match=says):
        load_from(read_config(["--model", str(model), *argv], {}))


def test_timesteps_fall():
    with pytest.raises(ConfigError, match="must fall"):
        ServerConfig(timesteps=(399, 399))
    assert read_config([], {"TURBOLENS_TIMESTEPS": "999, 499"}).timesteps == (999, 499)
    with pytest.raises(ConfigError, match="TIMESTEPS"):
        read_config([], {"TURBOLENS_TIMESTEPS": "999,x"})


@pytest.mark.parametrize("timesteps", [(399,), (999, 749, 499, 249)])
def test_timesteps_are_a_setting_and_a_jobs_own(timesteps, model, pipeline):
    pipeline.scheduler = diffusers.LCMScheduler.from_config(EulerDiscreteScheduler.load_config(model / "scheduler"))
    expected, steps = of_pipeline(pipeline, len(timesteps), timesteps=list(timesteps)), len(timesteps)
    set_to = load_engine(model=str(model), scheduler="LCM", timesteps=timesteps)
    free = load_engine(model=str(model), scheduler="LCM")
    assert set_to.info.default_steps == steps
    assert set_to.info.takes_timesteps
    assert torch.equal(of_engine(set_to, steps), expected)
    assert torch.equal(of_engine(free, steps, timesteps=timesteps), expected)
    assert not torch.equal(of_engine(free, steps), expected)
    assert torch.equal(of_engine(set_to, 2), of_engine(free, 2))


def test_a_unet_distilled_for_guidance_hears_its_scale(model, tmp_path):
    config = {key: value for key, value in UNet2DConditionModel.load_config(model / "unet").items() if key[0] != "_"}
    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 33})
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    save_random_model(tmp_path, unet, diffusers.LCMScheduler(timestep_spacing="trailing"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    walks = {}
    for scale in (8.0, 1.5):
        engine = load_engine(model=str(tmp_path), embedded_guidance=scale)
        walks[scale] = of_engine(engine, 2)
        assert torch.equal(walks[scale], of_pipeline(pipeline, 2, guidance_scale=scale))
        assert engine.info.embedded_guidance == scale
    assert not torch.equal(walks[8.0], walks[1.5])
    with pytest.raises(LoadError, match="guidance as an embedding"):
        load_engine(model=str(tmp_path), backend="onnx")


@pytest.mark.parametrize(("name", "settings", "previews"), SERVED)
def test_a_prediction_may_be_overwritten_by_the_next(name, settings, previews):
    """As a recorded U-Net does: samplers that look back must have kept their own."""
    sampler = Sampler(scheduler(name, **settings), torch.device("cpu"))
    walks = []
    for reused in (None, torch.empty(1, 4, 8, 8)):
        state = sampler.start(4, [0], (4, 8, 8), torch.float32)
        for t in state.timesteps:
            prediction = torch.tanh(state.scaled(t))
            state.advance(prediction if reused is None else reused.copy_(prediction), t)
        walks.append(state.latents)
    assert torch.equal(*walks)
