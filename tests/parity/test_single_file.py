"""Checkpoints and VAEs in one file of SDXL's original layout: served as the folder that they were made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from turbolens_server.config import read_config
from turbolens_server.engine.types import Job
from turbolens_server.loading.errors import LoadError
from turbolens_server.serving import load_from

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def of_unet(name: str, layers: int, with_attention: set[int]) -> str:
    """What the original layout calls a tensor of a U-Net: blocks are counted through, layer by layer."""
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    _, block, kind, index, rest = re.match(
        r"(down|mid|up)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()  # fmt: skip
    i, j = int(block or 0), int(index)
    if kind == "resnets":
        head, _, tail = rest.partition(".")
        rest = f"{RESNET[head]}.{tail}"
    match name.split("_", maxsplit=1)[0], kind:
        case "down", "downsamplers":
            return f"input_blocks.{(layers + 1) * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
        case "down", _:
            return f"input_blocks.{(layers + 1) * i + j + 1}.{int(kind == 'attentions')}.{rest}"
        case "mid", _:
            return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
        case "up", "upsamplers":
            return f"output_blocks.{(layers + 1) * i + layers}.{2 if i in with_attention else 1}.{rest}"
        case _:
            return f"output_blocks.{(layers + 1) * i + j}.{int(kind == 'attentions')}.{rest}"


def of_vae(name: str, levels: int) -> str:
    for ours, theirs in (
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        name = re.sub(ours, theirs, name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def of_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        plain = name.removeprefix("text_model.")
        if plain == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif "self_attn" in plain and "out_proj" not in plain:
            if ".q_proj." in plain:
                three = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
                at = plain.replace("encoder.layers", "transformer.resblocks").split(".self_attn")[0]
                found[f"{at}.attn.in_proj_{plain.rsplit('.')[-1]}"] = three
        else:
            for ours, theirs in (
                ("embeddings.token_embedding.weight", "token_embedding.weight"),
                ("embeddings.position_embedding.weight", "positional_embedding"),
                ("final_layer_norm", "ln_final"), ("encoder.layers", "transformer.resblocks"),
                ("self_attn", "attn"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                plain = plain.replace(ours, theirs)
            found[plain] = tensor
    return found


@pytest.fixture(scope="module")
def vae_tensors(tiny_folder: Path) -> dict[str, torch.Tensor]:
    vae = AutoencoderKL.from_pretrained(tiny_folder / "vae")
    return {of_vae(name, len(vae.config.block_out_channels)): t for name, t in vae.state_dict().items()}


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, vae_tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    unet = pipeline.unet
    attending = {i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    layers = unet.config.layers_per_block
    tensors = {
        f"model.diffusion_model.{of_unet(name, layers, attending)}": tensor
        for name, tensor in unet.state_dict().items()
    }
    assert len(tensors) == len(unet.state_dict())
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors.items()}
    first = pipeline.text_encoder.state_dict()
    at = "conditioner.embedders.0.transformer.text_model."
    tensors |= {at + name.removeprefix("text_model."): tensor for name, tensor in first.items()}
    second = of_open_clip(pipeline.text_encoder_2.state_dict())
    tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file


def load(*argv: str):
    return load_from(read_config(list(argv), {}))


def draw(engine) -> object:
    (result,) = engine.run([Job("a big red star", 3, 2, *engine.info.default_size)])
    return result


def test_a_checkpoint_in_one_file_is_served_as_its_folder_is(checkpoint: Path, tiny_folder: Path) -> None:
    single = load("--model", str(checkpoint), "--model-config", str(tiny_folder))
    folder = load("--model", str(tiny_folder))
    assert (draw(single).latents == draw(folder).latents).all()
    assert (draw(single).picture == draw(folder).picture).all()
    assert [p.name for p in single.info.hook_points] == [p.name for p in folder.info.hook_points]
    assert single.info.model_hash != folder.info.model_hash


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_in_one_file_is_served_as_its_folder_is(prefix, vae_tensors, tiny_folder: Path, tmp_path: Path) -> None:
    other = {name: tensor * 1.5 for name, tensor in vae_tensors.items()}
    save_file({f"{prefix}{name}": tensor for name, tensor in other.items()}, tmp_path / "vae.safetensors")
    vae = AutoencoderKL.from_pretrained(tiny_folder / "vae")
    vae.load_state_dict({name: tensor * 1.5 for name, tensor in vae.state_dict().items()})
    vae.save_pretrained(tmp_path / "vae")
    save_file(vae.state_dict(), tmp_path / "plain.safetensors")
    engines = [
        load("--model", str(tiny_folder), "--vae", str(tmp_path / name))
        for name in ("vae", "vae.safetensors", "plain.safetensors")
    ]
    pictures = [draw(engine).picture for engine in engines]
    assert all((picture == pictures[0]).all() for picture in pictures)
    assert len({engine.info.components_hash for engine in engines}) == 3
    assert (pictures[0] != draw(load("--model", str(tiny_folder))).picture).any()


def test_what_does_not_fit_is_named(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint)
    cut, file = dict(tensors), tmp_path / "a.safetensors"
    del cut["model.diffusion_model.out.2.weight"]
    for changed, says in (
        (cut, r"lacks tensors of UNet2DConditionModel: conv_out\.weight"),
        ({**tensors, "first_stage_model.encoder.extra.weight": torch.zeros(3)}, r"has \+3 values of the VAE"),
        ({**tensors, "model.diffusion_model.extra.weight": torch.zeros(3)}, r"has \+3 values of the U-Net"),
        (
            {**tensors, "conditioner.embedders.1.model.transformer.resblocks.9.ln_1.bias": torch.zeros(3)},
            r"has \+3 values of text_encoder_2",
        ),
        ({"unet.x.lora_A.weight": torch.zeros(1)}, "is a LoRA; give it by --lora"),
        ({"down_blocks.0.x": torch.zeros(1)}, "is a part of a model in the layout of diffusers"),
        ({"x": torch.zeros(1)}, "holds no U-Net"),
        ({k: t for k, t in tensors.items() if "first_stage" not in k}, "lacks a VAE"),
        ({k: t for k, t in tensors.items() if "conditioner" not in k}, "is a checkpoint of v1"),
        (
            {k: t for k, t in tensors.items() if "embedders.0" not in k or "layers.2." not in k},
            "lacks tensors of text_",
        ),
    ):
        save_file(changed, file)
        with pytest.raises(LoadError, match=says) as caught:
            load("--model", str(file), "--model-config", str(tiny_folder))
        assert "\n" not in str(caught.value)


def test_where_configurations_cannot_be_had_what_to_give_is_said(checkpoint: Path, monkeypatch) -> None:
    def nothing(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    with pytest.raises(LoadError, match=r"neither configurations nor vocabularies.*--model-config.*hf download"):
        load("--model", str(checkpoint))
    with pytest.raises(LoadError, match=rf"a checkpoint in one file is given by its path: --model {checkpoint}"):
        load("--model", str(checkpoint.parent))
    with pytest.raises(LoadError, match=r"--variant fp16: .* is one file"):
        load("--model", str(checkpoint), "--variant", "fp16")
    with pytest.raises(LoadError, match="--model-config x/y: is for a --model that is one"):
        load("--model", "mini", "--model-config", "x/y")
