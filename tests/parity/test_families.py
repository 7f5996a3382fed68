"""The models that people have, each as a small random folder: what the table in docs/models.md says of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from tests.conftest import save_random_model
from turbolens_server.config import read_config
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.types import Job
from turbolens_server.loading.errors import LoadError
from turbolens_server.serving import load_from
from turbolens_training.mini import model as parts

SIZE = 64
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 2),
    "layers_per_block": 1,
    "sample_size": SIZE // 4,
}
ALL = {"down.1.0", "mid.0", "up.0.0", "up.0.1"}

ROWS = {
    # Family: changes of the U-Net, scheduler and its settings, flags, steps, hook points, what diffusers' call says.
    "SDXL Turbo": ({}, "EulerAncestralDiscrete", {"timestep_spacing": "trailing"}, [], 1, ALL, {}),
    "SDXL-Lightning": ({}, "EulerDiscrete", {"timestep_spacing": "trailing"}, [], 4, ALL, {}),
    "LCM-SDXL": ({"time_cond_proj_dim": 16}, "LCM", {}, ["--embedded-guidance", "8"], 4, ALL, {"guidance_scale": 8.0}),
    "Hyper-SDXL, one step": ({}, "LCM", {}, ["--timesteps", "800"], 1, ALL, {"timesteps": [800]}),
    "DMD2, one step": ({}, "LCM", {}, ["--timesteps", "399"], 1, ALL, {"timesteps": [399]}),
    "DMD2": ({}, "LCM", {}, ["--timesteps", "999", "749", "499", "249"], 4, ALL, {"timesteps": [999, 749, 499, 249]}),
    "SDXL Flash": ({}, "DPMSolverSinglestep", {"lower_order_final": True}, [], 4, ALL, {}),
    "SSD-1B, Segmind-Vega": (
        {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": (1, 1)},
        "LCM", {}, [], 4, ALL - {"mid.0"}, {},
    ),
    "KOALA-700M": ({"mid_block_type": None}, "LCM", {}, [], 4, ALL - {"mid.0"}, {}),
}  # fmt: skip


def save(folder: Path, scheduler: str, changes=None, **settings) -> Path:
    torch.manual_seed(0)
    config = {key: value for key, value in parts.build_unet().config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config({**config, **SMALL, **(changes or {})})
    save_random_model(folder, unet, getattr(diffusers, f"{scheduler}Scheduler")(**LEVELS, **settings))
    return folder


def load(folder: Path, *flags: str) -> Engine:
    return load_from(read_config(["--model", str(folder), *flags], {}))


def walk(engine: Engine, steps: int) -> torch.Tensor:
    (result,) = engine.run([Job("a star", 3, steps, SIZE, SIZE)])
    return torch.from_numpy(result.latents)[None]


def of_pipeline(folder: Path, steps: int, **call) -> torch.Tensor:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 0.0, "num_inference_steps": steps, "height": SIZE, "width": SIZE, **call}
    return pipeline("a star", generator=torch.Generator().manual_seed(3), output_type="latent", **settings).images


@pytest.mark.parametrize("family", ROWS)
def test_a_family_is_served_as_the_table_says(family, tmp_path):
    changes, scheduler, settings, flags, steps, points, call = ROWS[family]
    folder = save(tmp_path, scheduler, changes, **settings)
    engine = load(folder, *flags)
    assert torch.equal(walk(engine, steps), of_pipeline(folder, steps, **call))
    asked = load(folder, *flags).info if points == ALL else engine.info
    assert {point.name for point in asked.hook_points} == points & {"mid.0", "up.0.0", "up.0.1"}


def test_the_table_in_the_docs_has_these_rows():
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    named = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert set(ROWS) <= set(named), set(ROWS) - set(named)
    for family in ROWS:
        row = next(line for line in table.splitlines() if line.startswith(f"| {family} |"))
        for flag in (flag for flag in ROWS[family][3] if flag.startswith("--")):
            assert flag in row


@pytest.fixture(scope="module")
def turbo(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("turbo"), "EulerAncestralDiscrete", timestep_spacing="trailing")


@pytest.fixture
def copy(turbo, tmp_path) -> Path:
    return shutil.copytree(turbo, tmp_path / "copy")


def settle(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline, and SDXL-type"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
        ("model_index.json", {"text_encoder": [None, None]}, "is an SDXL refiner"),
        ("unet/config.json", {"in_channels": 9}, "inpainting, 9 channels"),
        ("unet/config.json", {"in_channels": 8}, "edits a picture"),
        ("unet/config.json", {"in_channels": 5}, "takes 5 channels, and latents have 4"),
        ("unet/config.json", {"sample_size": None}, "sample_size=None.*give --size"),
        ("unet/config.json", {"sample_size": [8, 16]}, "sample_size=.*give --size"),
        ("unet/config.json", {"addition_embed_type": None}, "not an SDXL-type U-Net"),
    ],
)
def test_what_is_not_served_is_named(file, changes, says, copy):
    settle(copy / file, **changes)
    with pytest.raises(LoadError, match=says):
        load(copy)


def test_what_a_size_is_missing_for_can_be_given(copy):
    settle(copy / "unet/config.json", sample_size=None)
    assert load(copy, "--size", "64").info.default_size == (64, 64)
    settle(copy / "unet/config.json", sample_size=[16, 16])
    assert load(copy).info.default_size == (64, 64)


def test_weights_of_a_variant_alone_name_the_flag(copy):
    for path in [*copy.rglob("model.safetensors"), *copy.rglob("diffusion_pytorch_model.safetensors")]:
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    with pytest.raises(LoadError, match=r"unet: has the weights of variant fp16 alone; add --variant fp16"):
        load(copy)
    assert load(copy, "--variant", "fp16").info.default_steps == 1


def test_pickles_alone_say_how_to_convert(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"unet: has \.bin weights alone.*save_pretrained") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_say_reads_as_much_as_the_encoder(copy, turbo):
    for name in ("tokenizer", "tokenizer_2"):
        config = json.loads((copy / name / "tokenizer_config.json").read_text())
        config.pop("model_max_length")
        (copy / name / "tokenizer_config.json").write_text(json.dumps(config))
    engine, own = load(copy), load(turbo)
    assert engine.info.max_prompt_tokens == own.info.max_prompt_tokens
    assert torch.equal(walk(engine, 1), walk(own, 1))


def test_a_model_for_many_steps_is_a_warning(tmp_path, caplog):
    load(save(tmp_path, "EulerDiscrete", timestep_spacing="leading"))
    (event,) = [r.msg for r in caplog.records if r.name == "turbolens"]
    assert event["event"] == "few steps from little noise"
    assert "guidance" in event["reason"]


def test_no_hook_point_is_a_warning_and_any_backend_serves(tmp_path, graph_cache, caplog):
    pytest.importorskip("onnxruntime")
    changes = {"mid_block_type": "UNetMidBlock2D", "block_out_channels": (32, 32, 64),
               "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
               "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 2, 2)}  # fmt: skip
    folder = save(tmp_path, "EulerAncestralDiscrete", changes, timestep_spacing="trailing")
    plain = load(folder)
    assert [r.msg["event"] for r in caplog.records if r.name == "turbolens"] == ["no hook points"]
    assert plain.info.hook_points == ()
    exported = load(folder, "--backend", "onnx", "--cache", str(graph_cache))
    assert torch.allclose(walk(exported, 1), walk(plain, 1), atol=1e-3)
