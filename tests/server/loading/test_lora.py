"""LoRAs fused at load: as by diffusers and peft, in both layouts, told in the hashes; or one line that says why not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from turbolens_server.config import read_config
from turbolens_server.engine.types import Job
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.loading.lora import fuse_loras
from turbolens_server.serving import load_from

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT, TEXT_2 = "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1"
MODULES = {"unet": (ATTENTION, CONV), "text_encoder": (TEXT,), "text_encoder_2": (TEXT_2,)}
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
ALPHAS = {ATTENTION: 3.0, CONV: 1.0, TEXT: 4.0, TEXT_2: 0.5}
RANK = 2


@pytest.fixture
def pipeline(tiny_folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny_folder)


def layer(pipeline, part: str, name: str):
    module = getattr(pipeline, part)
    return module.get_submodule(name if hasattr(module, "text_model") else name.removeprefix("text_model."))


def matrices(pipeline, seed: int = 0) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Random (down, up) of each module by part."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for part, names in MODULES.items():
        for name in names:
            out, *rest = layer(pipeline, part, name).weight.shape
            down = 0.3 * torch.randn(RANK, *rest, generator=generator)
            drawn[part, name] = down, 0.3 * torch.randn(out, RANK, *([1] * len(rest[1:])), generator=generator)
    return drawn


def as_diffusers(drawn, path: Path, metadata=None) -> Path:
    tensors = {}
    for (part, name), (down, up) in drawn.items():
        tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    path.parent.mkdir(exist_ok=True, parents=True)
    told = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, path, {"format": "pt", **told})
    return path


def as_kohya(drawn, path: Path, alpha: float | None = None) -> Path:
    tensors = {}
    for (part, name), (down, up) in drawn.items():
        at = f"{KOHYA[part]}_{name.replace('.', '_')}"
        tensors |= {
            f"{at}.lora_down.weight": down,
            f"{at}.lora_up.weight": up,
            f"{at}.alpha": torch.tensor(alpha or ALPHAS[name]),
        }
    save_file(tensors, path)
    return path


def changes(pipeline, drawn, fused, scale) -> None:
    """Every weight is W + scale * B A where the LoRA has a module, and as it was elsewhere."""
    before = {part: getattr(pipeline, part).state_dict() for part in MODULES}
    for (part, name), (down, up) in drawn.items():
        own = layer(pipeline, part, name).weight
        change = torch.einsum("or,r...->o...", up.flatten(1), down)
        assert torch.allclose(layer(fused, part, name).weight, own + scale(name) * change, atol=1e-6)
        assert not torch.allclose(layer(fused, part, name).weight, own, atol=1e-3)
    for part, state in before.items():
        after = getattr(fused, part).state_dict()
        assert sum(not torch.equal(after[key], value) for key, value in state.items()) == len(MODULES[part])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_both_layouts_change_what_they_name(layout, pipeline, tiny_folder, tmp_path):
    drawn, fused = matrices(pipeline), StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    path = (as_diffusers if layout == "diffusers" else as_kohya)(drawn, tmp_path / "x.safetensors")
    told = fuse_loras(fused, [f"{path}=0.7"])
    assert [(lora.name, lora.weight, len(lora.hash)) for lora in told.loras] == [(str(path), 0.7, 64)]
    assert told.parts == set(MODULES)
    changes(pipeline, drawn, fused, lambda name: 0.7 * (ALPHAS[name] / RANK if layout == "kohya" else 1))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 6, "r": RANK}, {ATTENTION: 3.0, CONV: 3.0}),
        ({"lora_alpha": 6, "r": RANK, "use_rslora": True}, {ATTENTION: 6 / 2**0.5, CONV: 6 / 2**0.5}),
        ({"lora_alpha": 6, "r": RANK, "alpha_pattern": {"conv1": 1}}, {ATTENTION: 3.0, CONV: 0.5}),
    ],
)
def test_what_peft_writes_beside_a_file_counts(settings, scale, pipeline, tiny_folder, tmp_path):
    drawn = {key: value for key, value in matrices(pipeline).items() if key[0] == "unet"}
    path = as_diffusers(drawn, tmp_path / "x.safetensors", {f"unet.{key}": value for key, value in settings.items()})
    fused = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    fuse_loras(fused, [str(path)])
    for (part, name), (down, up) in drawn.items():
        change = torch.einsum("or,r...->o...", up.flatten(1), down)
        expected = layer(pipeline, part, name).weight + scale[name] * change
        assert torch.allclose(layer(fused, part, name).weight, expected, atol=1e-6)


def test_two_are_fused_as_by_diffusers_and_peft(pipeline, tiny_folder, tmp_path):
    """Of the U-Net, and of one alpha: the rest is where these libraries, as they are pinned, do otherwise or fail."""
    pytest.importorskip("peft")
    files, theirs = [], StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    for adapter, write in (("first", as_diffusers), ("second", functools.partial(as_kohya, alpha=3.0))):
        drawn = {key: value for key, value in matrices(pipeline, len(files)).items() if key[0] == "unet"}
        files.append(write(drawn, tmp_path / f"{adapter}.safetensors"))
        theirs.load_lora_weights(tmp_path, weight_name=files[-1].name, adapter_name=adapter)
    theirs.set_adapters(["first", "second"], [0.5, -1.5])
    theirs.fuse_lora(components=["unet"])
    theirs.unload_lora_weights()
    ours = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    fuse_loras(ours, [f"{files[0]}=0.5", f"{files[1]}=-1.5"])
    for key, value in theirs.unet.state_dict().items():
        assert torch.allclose(ours.unet.state_dict()[key], value, atol=1e-6), key
    assert not torch.allclose(layer(ours, "unet", CONV).weight, layer(pipeline, "unet", CONV).weight, atol=1e-3)


def test_a_model_with_a_lora_is_another_model(small_model, tmp_path):
    folder, saes = small_model
    drawn = matrices(StableDiffusionXLPipeline.from_pretrained(folder))
    unet = as_diffusers({k: v for k, v in drawn.items() if k[0] == "unet"}, tmp_path / "style" / "x.safetensors")
    text = as_diffusers({k: v for k, v in drawn.items() if k[0] != "unet"}, tmp_path / "text.safetensors")
    argv = ["--model", str(folder), "--sae", str(saes)]
    base = load_from(read_config(argv, {}))
    with pytest.raises(LoadError, match=r"but this one, with --lora, has .*pass --force-sae"):
        load_from(read_config([*argv, "--lora", str(unet.parent)], {}))
    styled = load_from(read_config([*argv, "--lora", f"{unet.parent}=0.5", "--force-sae"], {}))
    worded = load_from(read_config([*argv, "--lora", str(text)], {}))
    assert all(sae.forced for sae in styled.info.saes.values())
    assert not any(sae.forced for sae in worded.info.saes.values())
    assert [(lora.name, lora.weight) for lora in styled.info.loras] == [(str(unet.parent), 0.5)]
    assert styled.info.model_hash != base.info.model_hash == worded.info.model_hash
    assert styled.info.components_hash == base.info.components_hash != worded.info.components_hash
    stronger = load_engine(model=str(folder), loras=[f"{unet}=0.6"])
    assert stronger.info.model_hash != styled.info.model_hash
    made = [e.run([Job("a star", 3, 1, *e.info.default_size)])[0].latents for e in (base, styled, worded)]
    assert (made[0] != made[1]).any()
    assert (made[0] != made[2]).any()


def renamed(old: str, new: str):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed("attentions.0", "attentions.9"), "this model has no mid_block.attentions.9"),
        (lambda t: {k: v[..., :1].contiguous() if "to_q.lora_A" in k else v for k, v in t.items()}, "to_q are"),
        (lambda t: {k: v for k, v in t.items() if "to_q.lora_B" not in k}, "of mid_block.*to_q there is one matrix"),
        (lambda t: {k: v[:, :1].contiguous() if "to_q.lora_B" in k else v for k, v in t.items()}, "ranks 2 and 1"),
        (lambda t: {**t, "unet.x.dora_scale": torch.ones(1)}, "unet.x.dora_scale is of another kind"),
        (lambda t: {**t, "unet.conv_in.lora_magnitude_vector": torch.ones(1)}, "lora_magnitude_vector"),
        (lambda t: {**t, "unet.conv_in.lora_C.weight": torch.ones(1)}, "conv_in.lora_C.weight is no matrix"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "is torch.int8, expected floating-point"),
        (renamed("unet.", "transformer."), "transformer.*no part of this model"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(change, says, pipeline, tmp_path):
    file = as_diffusers(matrices(pipeline), tmp_path / "x.safetensors")
    save_file(change(load_file(file)), file)
    with pytest.raises(LoadError, match=f"^--lora {file}: .*{says}"):
        fuse_loras(pipeline, [str(file)])


def test_a_lora_that_is_not_there_or_not_one_is_refused(pipeline, tmp_path):
    for name in ("a", "b"):
        as_diffusers(matrices(pipeline), tmp_path / f"{name}.safetensors")
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    dora = as_diffusers(matrices(pipeline), tmp_path / "dora" / "x.safetensors", {"unet.use_dora": True})
    for source, says in (
        (f"{tmp_path}", "name one of the .safetensors files"),
        (f"{tmp_path}/x.bin", "pickles are not read"),
        (f"{tmp_path}/none.safetensors", "no such folder"),
        (f"{tmp_path}/cut.safetensors", "is no LoRA that diffusers reads"),
        (f"{tmp_path}/a.safetensors=much", "the weight after = is 'much'"),
        (f"{tmp_path}/a.safetensors=nan", "expected a number"),
        (f"{dora}", "use_dora is set"),
    ):
        with pytest.raises(LoadError, match=says):
            fuse_loras(pipeline, [source])
