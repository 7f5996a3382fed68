"""What loads, and the one line that is said of what does not."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from turbolens_server.config import read_config
from turbolens_server.engine.types import Job, StepDone
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.hashes import hash_components, hash_unet
from turbolens_server.loading.hub import embedded_saes, model_folder
from turbolens_server.loading.load import load_engine
from turbolens_server.rpc.warnings import late_start
from turbolens_server.sae.bundle import SaeWeights, save_bundle
from turbolens_server.sae.formats.read import find_saes
from turbolens_server.sae.twin import encode_dense
from turbolens_server.serving import load_from


def random_weights(d_in: int, d_sae: int = 48) -> SaeWeights:
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=-1)
    return SaeWeights(W_dec.T.contiguous(), torch.zeros(d_sae), W_dec, torch.randn(d_in))


@pytest.fixture
def bundle(tmp_path: Path, tiny_folder: Path) -> Path:
    folder = tmp_path / "mid"
    save_bundle(
        folder, hook_point="mid.0", hook_module="mid_block.attentions.0", model_name="tiny",
        model_hash=hash_unet(tiny_folder), architecture="topk", k=4, weights=random_weights(64), stats=None,
        provenance={"note": "random"},
    )  # fmt: skip
    return folder


def refused(**arguments) -> str:
    with pytest.raises(LoadError) as caught:
        load_engine(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_bundle_loads_on_its_own_model(bundle, tiny_folder):
    engine = load_engine(model=str(tiny_folder), saes=[str(bundle)])
    assert list(engine.info.saes) == ["mid.0"]
    assert not engine.info.saes["mid.0"].forced
    assert engine.info.saes["mid.0"].bundle.provenance == {"note": "random"}


def test_a_bundle_of_another_model_is_refused_unless_forced(bundle, tiny_folder):
    config = json.loads((bundle / "cfg.json").read_text())
    config["metadata"]["turbolens"]["model_hash"] = "0" * 64
    (bundle / "cfg.json").write_text(json.dumps(config))
    assert "--force-sae" in refused(model=str(tiny_folder), saes=[str(bundle)])
    assert load_engine(model=str(tiny_folder), saes=[str(bundle)], force_sae=True).info.saes["mid.0"].forced


def test_a_bundle_is_served_at_another_block_than_its_own_only_where_that_is_forced(bundle, tiny_folder):
    moved = [f"q@up.0.1={bundle}"]
    assert "trained on mid.0" in refused(model=str(tiny_folder), saes=moved)
    sae = load_engine(model=str(tiny_folder), saes=moved, force_sae=True).info.saes["q"]
    assert (sae.hook_point, sae.forced) == ("up.0.1", True)
    assert not load_engine(model=str(tiny_folder), saes=[f"q@mid.0={bundle}"]).info.saes["q"].forced


@pytest.mark.parametrize("source", ["", " "])
def test_an_sae_without_a_place_is_refused(source, tiny_folder):
    assert "names no folder" in refused(model=str(tiny_folder), saes=[source])


def write_reference(folder: Path, weights: SaeWeights, k: int = 4) -> Path:
    """A folder as the paper's authors publish them, made by hand."""
    final = folder / "unet.mid_block.attentions.0_k4_hidden48_auxk256_bs4096_lr0.0001" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text(json.dumps({"n_dirs_local": 48, "d_model": 64, "k": k, "auxk": 256}))
    state = {
        "encoder.weight": weights.W_enc.T.contiguous(),
        "decoder.weight": weights.W_dec.T.contiguous(),
        "pre_bias": weights.b_dec,
        "latent_bias": weights.b_enc,
        "stats_last_nonzero": torch.zeros(48, dtype=torch.long),
    }
    torch.save({"state_dict": state}, final / "state_dict.pth")
    torch.save(torch.linspace(0, 2, 48), final / "mean.pt")
    return final


def test_the_authors_folders_load_and_encode_by_their_formula(tmp_path, tiny_folder):
    weights = random_weights(64)
    write_reference(tmp_path, weights)
    engine = load_engine(model=str(tiny_folder), saes=[str(tmp_path)])
    info = engine.info.saes["mid.0"]
    assert info.bundle.k == 4
    assert np.allclose(info.bundle.stats.mean, np.linspace(0, 2, 48))
    x = torch.randn(20, 64)
    theirs = torch.nn.functional.linear(x - weights.b_dec, weights.W_enc.T) + weights.b_enc
    values, indices = theirs.topk(4)
    expected = torch.zeros(20, 48).scatter(-1, indices, values).relu()
    assert torch.allclose(encode_dense(info.bundle, x), expected, atol=1e-5)
    assert engine.run([Job("x", 0, 1, *engine.info.default_size, saes=("mid.0",))])[0].features


class _Payload:
    """What a hostile pickle would hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_never_run(tmp_path, tiny_folder):
    final = write_reference(tmp_path, random_weights(64))
    trace = tmp_path / "ran"
    (final / "state_dict.pth").write_bytes(pickle.dumps(_Payload(trace)))
    assert "refused" in refused(model=str(tiny_folder), saes=[str(final)])
    assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("cfg.json", lambda p: p.unlink(), "cfg.json"),
        ("cfg.json", lambda p: p.write_text("{"), "unreadable"),
        ("cfg.json", lambda p: p.write_text(p.read_text().replace('"topk"', '"gated"')), "gated"),
        ("cfg.json", lambda p: p.write_text(p.read_text().replace('"k": 4', '"k": 0')), "k=0"),
        ("cfg.json", lambda p: p.write_text(p.read_text().replace("mid.0", "mid.9")), "mid.9"),
        ("sae_weights.safetensors", lambda p: p.unlink(), "sae_weights.safetensors"),
        ("sae_weights.safetensors", lambda p: p.write_bytes(p.read_bytes()[:100]), "unreadable"),
        ("sae_weights.safetensors", lambda p: rewrite(p, b_enc=torch.zeros(3)), "b_enc has shape"),
        ("sae_weights.safetensors", lambda p: rewrite(p, b_dec=torch.full((64,), torch.nan)), "not finite"),
        ("sae_weights.safetensors", lambda p: rewrite(p, more=torch.zeros(1)), "more"),
        ("feature_stats.safetensors", lambda p: p.write_bytes(b"x"), "feature_stats"),
    ],
)
def test_every_malformed_bundle_is_refused_in_one_line(file, change, says, bundle, tiny_folder):
    change(bundle / file)
    assert says in refused(model=str(tiny_folder), saes=[str(bundle)])


def rewrite(path: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(path), **tensors}, path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "/no/such/folder"}, "no such folder"),
        ({"model": "./relative"}, "no such folder"),
        ({"device": "tpu9"}, "--device"),
        ({"device": "cuda"}, "sees no GPU"),
        ({"dtype": "int4"}, "--dtype"),
        ({"vae": "/no/such/vae"}, "--vae"),
        ({"saes": ["/no/such/sae"]}, "--sae"),
    ],
)
def test_what_cannot_be_served_says_why(arguments, says):
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert says in refused(**arguments)


@pytest.mark.parametrize(
    ("widths", "channels", "says"),
    [((8, 8, 8), 3, "3 latent channels; this model needs 4"), ((8, 8), 4, "2 times the latent's size; .* needs 4")],
)
def test_a_vae_of_another_shape_is_refused(widths, channels, says, tmp_path, tiny_folder):
    from diffusers import AutoencoderTiny

    blocks = (1,) * len(widths)
    AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=blocks,
        num_decoder_blocks=blocks, latent_channels=channels,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert re.search(says, refused(model=str(tiny_folder), vae=str(tmp_path)))


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf download nobody/nothing" in refused(model="nobody/nothing")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_a_hub_id_only_what_is_loaded_is_fetched(monkeypatch, tiny_folder, variant):
    """`diffusers` knows which files those are: it is asked for the one variant, and for nothing but safetensors."""
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(tiny_folder)

    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.download", download)
    assert model_folder("owner/name", variant) == tiny_folder
    assert asked == [("owner/name", {"variant": variant, "use_safetensors": True})]


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "model_index.json" in refused(model=str(tmp_path))


def test_links_to_folders_of_saes_are_followed_once(bundle, tmp_path, tiny_folder):
    """Also where one leads back, or two lead to the same; the folder's own name counts."""
    root = tmp_path / "root"
    shutil.copytree(bundle, root / "own")
    (root / "a-link").symlink_to(root / "own")
    (root / "back").symlink_to(root)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(bundle, elsewhere / "deep")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked-too").symlink_to(elsewhere / "deep")
    (root / ".own-1234").symlink_to(bundle)  # what a writer that was killed leaves
    assert [path.relative_to(root).as_posix() for path in find_saes(root)] == ["linked/deep", "own"]
    (root / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"gone: a link that leads nowhere"):
        load_engine(model=str(tiny_folder), saes=[str(root)])


def test_two_saes_of_one_name_are_refused(bundle, tmp_path, tiny_folder):
    shutil.copytree(bundle, tmp_path / "again")
    assert "mid.0" in refused(model=str(tiny_folder), saes=[str(bundle), str(tmp_path / "again")])


def test_several_foreign_saes_of_one_block_are_served_under_names(tmp_path, tiny_folder):
    few = write_reference(tmp_path / "k=4", random_weights(64), k=4)
    many = write_reference(tmp_path / "k=8", random_weights(64), k=8)
    nameless = Path(shutil.copytree(many, tmp_path / "nameless"))
    assert "--sae NAME=PATH" in refused(model=str(tiny_folder), saes=[str(few), str(many)])
    engine = load_engine(model=str(tiny_folder), saes=[str(few), f"k8={many}", f"other@up.0.1={nameless}"])
    served = {name: (sae.hook_point, sae.bundle.k) for name, sae in engine.info.saes.items()}
    assert served == {"mid.0": ("mid.0", 4), "k8": ("mid.0", 8), "other": ("up.0.1", 8)}
    (result,) = engine.run([Job("x", 0, 1, *engine.info.default_size, saes=("mid.0", "k8"))])
    assert {codes.sae for codes in result.features} == {"mid.0", "k8"}


def test_a_block_can_be_given_with_and_without_a_name(tmp_path, tiny_folder):
    nameless = Path(shutil.copytree(write_reference(tmp_path, random_weights(64)), tmp_path / "nameless"))
    for given, name in (("mid.0", "mid.0"), ("@mid.0", "mid.0"), ("a@mid.0", "a")):
        info = load_engine(model=str(tiny_folder), saes=[f"{given}={nameless}"]).info
        assert [(sae.name, sae.hook_point) for sae in info.saes.values()] == [(name, "mid.0")]


def test_a_bundle_can_be_served_under_another_name(bundle, tiny_folder):
    info = load_engine(model=str(tiny_folder), saes=[str(bundle), f"again={bundle}"]).info
    assert list(info.saes) == ["mid.0", "again"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a@attic=", "no block attic"),
        ("mid.9=", "no block mid.9"),
        ("up.0.1@mid.0=", "cannot be called up.0.1: that is a block"),
        ("up,0=", "no name of an SAE"),
        ("k5=/no/such", "no such folder"),
    ],
)
def test_a_name_or_block_that_cannot_be_is_refused(given, says, bundle, tiny_folder):
    assert says in refused(model=str(tiny_folder), saes=[f"{given}{bundle}"])


def test_the_wrong_width_is_refused(bundle, tiny_folder):
    rewritten = random_weights(32)
    save_file(rewritten.tensors(), bundle / "sae_weights.safetensors")
    config = json.loads((bundle / "cfg.json").read_text())
    (bundle / "cfg.json").write_text(json.dumps(config | {"d_in": 32}))
    assert "32 dimensions" in refused(model=str(tiny_folder), saes=[str(bundle)])


UNET = "unet/diffusion_pytorch_model"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model_copy(tmp_path, tiny_folder) -> Path:
    """A model to rename files of."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_a_model_is_known_by_its_unets_weights(model_copy):
    assert hash_unet(model_copy) == digest(model_copy / f"{UNET}.safetensors")


def test_a_unet_without_the_variant_is_known_by_the_weights_that_are_loaded(model_copy):
    text = model_copy / "text_encoder"
    (text / "model.safetensors").rename(text / "model.fp16.safetensors")
    engine = load_engine(model=str(model_copy), variant="fp16")
    assert engine.info.model_hash == digest(model_copy / f"{UNET}.safetensors")


def test_a_variant_is_known_by_its_own_weights(model_copy):
    other = {name: tensor + 1 for name, tensor in load_file(model_copy / f"{UNET}.safetensors").items()}
    save_file(other, model_copy / f"{UNET}.fp16.safetensors")
    assert hash_unet(model_copy, "fp16") == digest(model_copy / f"{UNET}.fp16.safetensors")
    assert hash_unet(model_copy) == digest(model_copy / f"{UNET}.safetensors")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_saves_them_are_all_hashed(variant, model_copy):

    unet = UNet2DConditionModel.from_pretrained(model_copy / "unet")
    (model_copy / f"{UNET}.safetensors").unlink()
    unet.save_pretrained(model_copy / "unet", variant=variant, max_shard_size="1MB")
    shards = sorted((model_copy / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    expected = hashlib.sha256("".join(digest(shard) for shard in shards).encode()).hexdigest()
    assert load_engine(model=str(model_copy), variant=variant).info.model_hash == expected


def test_shards_in_the_older_naming_are_all_hashed(model_copy):
    unet = model_copy / "unet"
    whole = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]
    keys = sorted(whole)
    for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
        save_file({key: whole[key] for key in part}, unet / name, {"format": "pt"})
    weight_map = {key: names[n % 2] for n, key in enumerate(keys)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (unet / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(index))
    expected = hashlib.sha256("".join(digest(unet / name) for name in names).encode()).hexdigest()
    assert hash_unet(model_copy, "fp16") == expected


@pytest.mark.parametrize(
    "part",
    [
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
        "text_encoder_2/config.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_every_part_of_a_model_counts_in_the_hash_beside_the_unets(part, model_copy):
    before = hash_components(model_copy)
    assert hash_components(model_copy) == before
    (model_copy / part).write_bytes((model_copy / part).read_bytes() + b" ")
    assert hash_components(model_copy) != before
    assert hash_unet(model_copy) == digest(model_copy / f"{UNET}.safetensors")


def test_another_vae_is_told_by_the_hash_beside_the_unets(model_copy, tiny_folder):
    vae = model_copy / "vae"
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, vae / "diffusion_pytorch_model.safetensors")
    own = load_engine(model=str(tiny_folder)).info
    other = load_engine(model=str(tiny_folder), vae=str(vae)).info
    assert own.model_hash == other.model_hash
    assert own.components_hash != other.components_hash
    assert other.components_hash == load_engine(model=str(model_copy)).info.components_hash


FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.mark.parametrize("part", FILES)
def test_weights_that_are_missing_are_named_at_load(part, model_copy, tiny_folder):
    """Text encoders would be drawn at random, another picture at each start, under one hash."""
    file = model_copy / part / FILES[part]
    tensors = load_file(file)
    gone = sorted(tensors)[7]
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoadError, match=rf"{part}/{FILES[part]} lacks 1 tensor: .*{re.escape(gone)}$") as caught:
        load_engine(model=str(model_copy))
    assert "\n" not in str(caught.value)
    if part == "vae":
        with pytest.raises(LoadError, match=rf"--vae .*{re.escape(gone)}$"):
            load_engine(model=str(tiny_folder), vae=str(model_copy / part))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("part", FILES)
def test_weights_that_are_not_finite_are_named_at_load(part, value, model_copy, tiny_folder):
    """One value is enough: not each of them shows in what a start tries."""
    file = model_copy / part / FILES[part]
    tensors = load_file(file)
    name = sorted(tensors)[7]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    told = rf"{part}: \S*{re.escape(name)} holds values that are not finite; its file is damaged$"
    with pytest.raises(LoadError, match=told) as caught:
        load_engine(model=str(model_copy))
    assert str(caught.value).startswith(str(model_copy))
    if part == "vae":
        with pytest.raises(LoadError, match=told):
            load_engine(model=str(tiny_folder), vae=str(model_copy / part))


def test_weights_past_a_narrow_type_are_named_with_one_that_holds_them(model_copy):
    file = model_copy / "unet" / FILES["unet"]
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LoadError, match=r"unet: conv_in\.bias .* or is past float16 \(try --dtype float32\)$"):
        load_engine(model=str(model_copy), dtype="float16")
    load_engine(model=str(model_copy))


def test_weights_under_other_names_are_missing(model_copy):
    file = model_copy / "text_encoder_2" / "model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(LoadError, match=r"text_encoder_2/model\.safetensors lacks \d+ tensors: .* and \d+ more$"):
        load_engine(model=str(model_copy))


@pytest.mark.parametrize("part", FILES)
def test_of_two_sets_of_weights_neither_is_hashed_while_the_other_is_loaded(part, model_copy):
    """`transformers` would take the single file, `diffusers` the shards."""
    stem = FILES[part].removesuffix(".safetensors")
    shard = f"{stem}-00001-of-00001.safetensors"
    tensors = load_file(model_copy / part / FILES[part])
    save_file(tensors, model_copy / part / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, shard)}
    (model_copy / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=rf"{part}: holds both {FILES[part]} and .*; keep the one"):
        load_engine(model=str(model_copy))
    (model_copy / part / FILES[part]).unlink()
    load_engine(model=str(model_copy))


_SDXL = '"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["transformers", "CLIPTextModel"]'


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "unreadable"),
        ("[]", "holds a list, expected an object"),
        ("{}", "does not say what pipeline"),
        (f'{{{_SDXL}, "unet": null}}', "does not say what unet"),
        (f'{{{_SDXL}, "unet": ["os", "system"]}}', "does not say what unet"),
    ],
)
def test_a_model_index_of_another_form_is_one_line(index, why, model_copy):
    (model_copy / "model_index.json").write_text(index)
    with pytest.raises(LoadError, match=rf"model_index\.json: {why}") as caught:
        load_engine(model=str(model_copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [f"{part}/{name}" for part, name in FILES.items()] + ["unet/config.json"])
def test_a_cut_file_of_a_model_is_one_line(file, model_copy):
    path = model_copy / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LoadError, match=rf"{file.partition('/')[0]}/.*(cannot be loaded|unreadable)") as caught:
        load_engine(model=str(model_copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spacing", "late"), [("leading", {1: 1, 2: 501, 3: 667, 4: 751}), ("linspace", {1: 0})])
def test_a_scheduler_that_starts_where_pictures_are_half_done_says_so(spacing, late, model_copy):
    """`EulerDiscreteScheduler` draws noise at one step with the spacing that many folders name."""
    config = model_copy / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(config.read_text()), "timestep_spacing": spacing, "steps_offset": 1}
    config.write_text(json.dumps(settings))
    info = load_engine(model=str(model_copy)).info
    assert info.late_starts == late
    told = late_start(info, {1})
    assert f"timestep_spacing={spacing!r} of EulerDiscreteScheduler starts 1 step at timestep {late[1]} of 1000" in told
    assert "--timestep-spacing trailing" in told
    assert late_start(load_engine(model=str(model_copy), timestep_spacing="trailing").info) is None


def test_a_unet_without_weights_has_no_hash(model_copy):
    (model_copy / f"{UNET}.safetensors").unlink()
    with pytest.raises(LoadError, match="is missing"):
        hash_unet(model_copy)


def with_scheduler(folder: Path, name: str) -> str:
    """The folder of a model, with another scheduler of diffusers."""
    for file, change in (
        ("scheduler/scheduler_config.json", {"_class_name": name}),
        ("model_index.json", {"scheduler": ["diffusers", name]}),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **change}))
    return str(folder)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "LMSDiscreteScheduler"])
def test_other_schedulers_are_served_step_by_step(scheduler, model_copy):
    engine = load_engine(model=with_scheduler(model_copy, scheduler))
    done = []
    engine.run([Job("x", 0, 3, *engine.info.default_size)], on_event=done.append)
    assert [event.step for event in done if isinstance(event, StepDone)] == [0, 1, 2]


def test_the_size_is_the_models_own_whatever_its_folder_is_called(tmp_path, tiny_folder):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "turbolens-turbo"))
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 256}))
    downscale = 2 ** (len(json.loads((model / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    size = 256 * downscale
    assert load_engine(model=str(model)).info.sizes == ((size, size),)


def test_another_size_is_served_where_it_is_asked_for(tiny_folder):
    engine = load_from(read_config(["--model", str(tiny_folder), "--size", "96"], {}))
    assert engine.info.default_size == (96, 96)
    assert engine.info.sizes == ((96, 96),)
    assert engine.run([Job("x", 0, 1, 96, 96)])[0].picture.shape == (96, 96, 3)


@pytest.mark.parametrize("size", [0, -32, 16, 100, 104])
def test_a_size_that_the_unet_cannot_halve_is_refused(size, tiny_folder):
    assert re.search(rf"--size {size}: must be a multiple of 16, from 32", refused(model=str(tiny_folder), size=size))


def test_the_embedded_saes_were_trained_on_the_embedded_model(engine):
    assert len(list(embedded_saes().glob("*/cfg.json"))) == 4
    assert [sae.forced for sae in engine.info.saes.values()] == [False] * 4
    assert list(engine.info.saes) == [point.name for point in engine.info.hook_points]
