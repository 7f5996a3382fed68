"""Other projects' folders: the same features as by the project's own formula, or one line that says why not."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import foreign_saes as foreign
import numpy as np
import pytest
import torch
from foreign_saes import D_IN, D_SAE, KINDS, K
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turbolens_server.sae.bundle import Bundle, BundleError, Nesting, load_bundle, save_bundle
from turbolens_server.sae.formats.read import detect, find_saes, read_sae
from turbolens_server.sae.sae import Sae
from turbolens_server.sae.twin import decode_dense, encode_dense
from turbolens_server.unet.points import find_point, module_of


def dense(bundle: Bundle, x: torch.Tensor) -> torch.Tensor:
    """Features as they are served, [N, D_SAE]."""
    codes = Sae(bundle, torch.device("cpu")).encode(x)
    return torch.zeros(len(x), bundle.d_sae).scatter(1, codes.indices, codes.values)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_a_folder_gives_its_own_projects_features(kind, seed, tmp_path_factory):
    theirs = KINDS[kind](seed)
    bundle = read_sae(theirs.write(tmp_path_factory.mktemp("x") / "down.2.1"))
    x = theirs.clear(2 * foreign.draw(seed + 9, 64, D_IN))
    expected = theirs.encode(x)
    assert len(x) > 20
    assert (expected > 0).any()
    for found in (encode_dense(bundle, x), dense(bundle, x)):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(found > 1e-3, expected > 1e-3)
    assert torch.allclose(decode_dense(bundle, expected), theirs.decode(expected), rtol=1e-4, atol=1e-3)
    assert bundle.hook_point == "down.2.1"
    assert bundle.k == theirs.k
    assert kind.startswith(bundle.provenance["format"])
    assert bundle.provenance["config"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_bundle_is_the_folder_it_came_from(kind, tmp_path):
    read = read_sae(KINDS[kind](7).write(tmp_path / "down.2.1"))
    save_bundle(
        tmp_path / "ours", hook_point="down.2.1", hook_module=module_of("down.2.1"), model_name=None, model_hash=None,
        architecture=read.architecture, k=read.k, weights=read.weights, stats=read.stats, provenance=read.provenance,
        nesting=read.nesting,
    )  # fmt: skip
    ours = load_bundle(tmp_path / "ours")
    assert ours.weights.tensors().keys() == read.weights.tensors().keys()
    assert all(torch.equal(t, ours.weights.tensors()[name]) for name, t in read.weights.tensors().items())
    assert dataclasses.replace(ours, weights=read.weights, stats=None, hash=read.hash, folder=read.folder) == (
        dataclasses.replace(read, stats=None)
    )
    assert (ours.stats is None) == (read.stats is None)
    assert read_sae(tmp_path / "ours").name == "down.2.1"


def test_the_widths_of_sae_lens_may_be_asked_for(tmp_path):
    theirs = foreign.saelens_matryoshka(3)
    bundle = read_sae(theirs.write(tmp_path / "mid.0"))
    assert bundle.architecture == "jumprelu"
    assert bundle.nesting == Nesting(None, (4, 9, D_SAE))
    assert bundle.refused(None, 5) == {"prefix": f"allows 4, 9, {D_SAE}"}
    x = theirs.clear(2 * foreign.draw(9, 64, D_IN))
    codes = Sae(bundle, torch.device("cpu")).encode(x, prefix=9)
    found = torch.zeros(len(x), D_SAE).scatter(1, codes.indices, codes.values)
    expected = theirs.encode(x)
    expected[:, 9:] = 0
    assert (expected > 0).any()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(encode_dense(bundle, x, prefix=9), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("widths", [[9, 4], [0, 4], [4, D_SAE + 1], [4, "9"], "4,9"])
def test_widths_that_cannot_be_are_refused(widths, tmp_path):
    theirs = foreign.saelens_matryoshka(3)
    theirs.files["cfg.json"]["metadata"]["training_architecture_details"]["matryoshka_widths"] = widths
    with pytest.raises(BundleError, match=r"matryoshka_widths=.* must be rising sizes up to 18"):
        read_sae(theirs.write(tmp_path / "mid.0"))


def test_the_published_means_come_along(tmp_path):
    stats = read_sae(foreign.sdxl_unbox(0).write(tmp_path / "mid.0")).stats
    assert np.allclose(stats.mean, np.linspace(0, 2, D_SAE))
    assert len(stats.update_rms) == 0


def test_narrow_types_are_read_exactly(tmp_path):
    theirs = foreign.sparsify(3)
    half = {name: tensor.bfloat16() for name, tensor in theirs.files["sae.safetensors"].items()}
    theirs.files["sae.safetensors"] = half
    weights = read_sae(theirs.write(tmp_path / "down.2.1")).weights
    assert weights.W_enc.dtype is torch.float32
    assert torch.equal(weights.W_enc, half["encoder.weight"].T.float())


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("unet.down_blocks.2.attentions.1_k10_hidden5120_auxk256_bs4096_lr0.0001", "down.2.1"),
        ("unet.mid_block.attentions.0", "mid.0"),
        ("up_blocks.0.attentions.1", "up.0.1"),
        ("unet.down_blocks.2.attentions.1.transformer_blocks.3.attn2", "down.2.1.attn2.3"),
        ("mid.0.attn1.0", "mid.0.attn1.0"),
        ("mid.0.attn1.0.z", "mid.0.attn1.0.z"),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.hook_z", "mid.0.attn2.1.z"),
        ("unet_mid_block_attentions_0_transformer_blocks_1_attn2_z_k10", "mid.0.attn2.1.z"),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn2.zero", "mid.0.attn2.1"),
        ("up.0.1", "up.0.1"),
        ("unet_up_blocks_0_attentions_0_out", "up.0.0"),
        ("unet_mid_block_attentions_0", "mid.0"),
        ("unet_down_blocks_2_attentions_1_transformer_blocks_3_attn2", "down.2.1.attn2.3"),
        ("warm up.0.1", None),
        ("blocks.3.hook_resid_post", None),
        ("final", None),
    ],
)
def test_blocks_are_found_in_names(text, block):
    assert find_point(text) == block
    if block is not None:
        assert find_point(f"unet.{module_of(block)}") == block


def test_the_block_is_told_found_or_asked_for(tmp_path):
    final = foreign.sdxl_unbox(0).write(tmp_path / "unet.up_blocks.0.attentions.1_k3_hidden18" / "final")
    assert read_sae(final).hook_point == "up.0.1"
    assert read_sae(final, "mid.0").hook_point == "mid.0"
    nameless = foreign.sparsify(0).write(tmp_path / "somewhere")
    with pytest.raises(BundleError, match="which block"):
        read_sae(nameless)


def test_every_folder_below_is_found(tmp_path):
    foreign.sdxl_unbox(0).write(tmp_path / "mid.0" / "final")
    foreign.sparsify(0).write(tmp_path / "down.2.1")
    (tmp_path / "empty").mkdir()
    assert find_saes(tmp_path) == [tmp_path / "down.2.1", tmp_path / "mid.0" / "final"]
    assert [detect(folder) for folder in find_saes(tmp_path)] == ["sparsify", "sdxl-unbox"]


class _Payload:
    """What a hostile pickle would hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["sdxl-unbox", "openai", "dictionary_learning TopK", "overcomplete SAE", "saev"])
@pytest.mark.parametrize("how", ["torch", "pickle", "beside the tensors"])
def test_code_in_a_pickle_is_never_run(kind, how, tmp_path):
    theirs = KINDS[kind](0)
    folder, trace = theirs.write(tmp_path / "down.2.1"), tmp_path / "ran"
    (name,) = (name for name in theirs.files if name.startswith(("state_dict", "ae", "sae")))
    if how == "pickle":
        (folder / name).write_bytes(pickle.dumps(_Payload(trace)))
    else:
        held = theirs.files[name][1] if isinstance(theirs.files[name], tuple) else theirs.files[name]
        hostile = _Payload(trace) if how == "torch" else {**held, "x": _Payload(trace)}
        theirs.files[name] = (theirs.files[name][0], hostile) if held is not theirs.files[name] else hostile
        theirs.write(folder)
    with pytest.raises(BundleError, match=rf"{name}: refused.*not run"):
        read_sae(folder)
    assert not trace.exists()


def drop(*names):
    return lambda files: [files["cfg.json" if "cfg.json" in files else "config.json"].pop(name) for name in names]


def settle(**values):
    return lambda files: files["cfg.json" if "cfg.json" in files else "config.json"].update(values)


def trainer(**values):
    return lambda files: files["config.json"]["trainer"].update(values)


def tensors(files):
    """The tensors of any folder's weights."""
    (name,) = (name for name in files if name.endswith((".safetensors", ".pth")) or name in ("ae.pt", "state_dict.pt"))
    return files[name].get("state_dict", files[name])


def put(name, tensor):
    return lambda files: tensors(files).update({name: tensor})


def without(name):
    return lambda files: tensors(files).pop(name)


NAN = torch.full((D_IN,), torch.nan)
MALFORMED = [
    ("sdxl-unbox", drop("k"), "config.json: k=None"),
    ("sdxl-unbox", settle(k=True), "k=True"),
    ("sdxl-unbox", settle(k=2.0), "k=2.0"),
    ("sdxl-unbox", settle(k=D_SAE + 1), "more than its 18 features"),
    ("sdxl-unbox", settle(d_model=7), "d_model=7, but the weights have 6"),
    ("sdxl-unbox", settle(n_dirs_local=7), "n_dirs_local=7"),
    ("sdxl-unbox", without("pre_bias"), "lacks pre_bias"),
    ("sdxl-unbox", put("pre_bias", NAN), "not finite"),
    ("sdxl-unbox", put("pre_bias", torch.zeros(D_IN, dtype=torch.int)), "torch.int32"),
    ("sdxl-unbox", put("pre_bias", torch.zeros(D_IN).to_sparse()), "dense floats"),
    ("sdxl-unbox", put("pre_bias", "a text"), "is a str"),
    ("sdxl-unbox", put("latent_bias", torch.zeros(D_SAE + 1)), "but the weights have 19"),
    ("openai", put("pre_bias", torch.zeros(D_IN + 1)), "b_dec has shape"),
    ("sdxl-unbox", put("encoder.weight", torch.zeros(D_SAE)), "expected 2 dimensions"),
    ("sdxl-unbox", put("encoder.weight", torch.zeros(0, D_IN)), "none 0"),
    ("sdxl-unbox", put("surprise", torch.zeros(1)), "surprise"),
    ("sdxl-unbox", lambda files: files.update({"state_dict.pth": [1]}), "holds a list"),
    ("sdxl-unbox", lambda files: files.update({"config.json": [1]}), "holds a list"),
    ("sdxl-unbox", lambda files: files.update({"mean.pt": torch.zeros(3)}), "18 finite means"),
    ("sdxl-unbox", settle(input_unit_norm=True), "input_unit_norm=True is not known"),
    ("sdxl-unbox, of OpenAI's TopK", put("activation.k", K + 1), "activation.k is 4, expected 3"),
    ("sdxl-unbox, of OpenAI's TopK", put("activation.postact_fn", "Identity"), "'Identity', expected 'ReLU'"),
    ("openai, tied", put("decoder.linear.weight", torch.zeros(D_SAE, D_IN)), "differs from encoder.weight"),
    ("openai", put("activation", "TopK"), "normalises each token"),
    ("openai", put("activation", "Identity"), "'Identity'"),
    ("sparsify", settle(k=0), "k=0"),
    ("sparsify", settle(num_latents=7), "num_latents=7"),
    ("sparsify", settle(num_latents=0, expansion_factor=2), "expansion_factor"),
    ("sparsify", settle(d_in=7), "d_in=7"),
    ("sparsify", settle(activation="groupmax"), "groupmax"),
    ("sparsify", settle(transcode=True), "transcode"),
    ("sparsify", settle(skip_connection=True), "skip_connection"),
    ("sparsify", settle(input_unit_norm=True), "input_unit_norm=True.*own mean and deviation"),
    ("sparsify", settle(batch_topk=True), "batch_topk"),
    ("sparsify", settle(sample_topk=True), "sample_topk.*whole picture"),
    ("sparsify", settle(new_switch=False), "new_switch=False is not known here"),
    ("sparsify, by latentsae", settle(sae_type="LISTA"), "sae_type='LISTA'.*inhibit"),
    ("sparsify, by latentsae", settle(sae_type="NEW"), "sae_type='NEW'.*not known"),
    ("sparsify, by latentsae", settle(use_skip=True), "use_skip"),
    ("sparsify, by latentsae", settle(matryoshka_ks="1,2"), "each with one of matryoshka_ks"),
    ("sparsify, by latentsae", settle(matryoshka_ks="1,2,x"), "matryoshka_ks='1,2,x'"),
    ("sparsify, by latentsae", settle(matryoshka_sizes="2,9,17"), "matryoshka_sizes ends with 17"),
    ("sparsify, by latentsae", without("input_mean"), "input_mean is missing"),
    ("sparsify", put("W_skip", torch.zeros(D_IN, D_IN)), "W_skip"),
    ("sparsify", put("W_dec", torch.zeros(D_IN, D_SAE)), "W_dec has shape"),
    ("dictionary_learning TopK", drop("trainer"), "trainer"),
    ("dictionary_learning TopK", trainer(dict_class="CrossCoder"), "'CrossCoder'"),
    ("dictionary_learning TopK", trainer(input_norm=True), "input_norm=True is not known here"),
    ("dictionary_learning TopK", trainer(k=K + 1), "ae.pt has 3"),
    ("dictionary_learning TopK", trainer(dict_size=7), "dict_size=7"),
    ("dictionary_learning TopK", trainer(dict_class="JumpReluAutoEncoder"), "lacks W_enc"),
    ("dictionary_learning BatchTopK", put("threshold", torch.tensor(-1.0)), "training never set it"),
    ("dictionary_learning BatchTopK", put("threshold", torch.tensor(torch.nan)), "threshold is nan"),
    ("dictionary_learning BatchTopK", without("threshold"), "threshold is missing"),
    ("dictionary_learning ReLU", put("decoder.weight", torch.zeros(D_IN, D_SAE)), "row 0 is zero"),
    ("llamascopium topk", settle(sae_type="clt"), "sae_type='clt'.*no SAE of one hook point"),
    ("llamascopium topk", settle(use_glu_encoder=True), "use_glu_encoder"),
    ("llamascopium topk", settle(hook_point_out="mid_block.attentions.0"), "another module's output"),
    ("llamascopium topk", settle(act_fn="batchtopk"), "'batchtopk'"),
    ("llamascopium topk", settle(norm_activation="token-wise"), "token-wise.*own norms"),
    ("llamascopium topk", settle(d_model=7), "d_model=7"),
    ("llamascopium topk", without(f"dataset_average_activation_norm.{foreign.BLOCK}"), "average_activation_norm"),
    ("llamascopium topk", put(f"dataset_average_activation_norm.{foreign.BLOCK}", torch.tensor(0.0)), "above 0"),
    ("llamascopium topk", put("W_E_glu", torch.zeros(D_IN, D_SAE)), "W_E_glu"),
    ("overcomplete TopKSAE", drop("top_k"), "top_k=None"),
    ("overcomplete TopKSAE", settle(**{"class": "BatchTopKSAE"}), "'BatchTopKSAE'"),
    ("overcomplete TopKSAE", settle(normalization="l3"), "normalization='l3'"),
    ("overcomplete TopKSAE", put("thresholds", torch.zeros(D_SAE)), "thresholds, which a linear TopKSAE does not have"),
    ("overcomplete TopKSAE", put("encoder.final_block.1.running_mean", torch.zeros(D_SAE)), "running_mean"),
    ("overcomplete TopKSAE", put("encoder.final_block.0.weight", torch.zeros(D_SAE, 2)), "has shape"),
    ("overcomplete TopKSAE", without("dictionary._weights"), "dictionary._weights is missing"),
    ("overcomplete JumpSAE", without("thresholds"), "thresholds is missing"),
    ("saev", lambda files: files["sae.pt"][0].update(whiten=1), "whiten=1 is not known"),
    ("saev", lambda files: files["sae.pt"][0].update(d_vit=7), "d_vit=7"),
    ("saev", lambda files: files.update({"sae.pt": ([1], {})}), "begins with a list"),
    ("saev, of a schema", lambda files: files["sae.pt"][0]["cfg"]["activation"].update(cls="TopK"), "'TopK'.*negative"),
    ("saelens topk", settle(k=None), "k=None"),
    ("saelens topk", settle(k=D_SAE + 1), "more than its 18 features"),
    ("saelens topk", settle(d_sae=7), "d_sae=7"),
    ("saelens topk", settle(architecture="abstopk"), "'abstopk'"),
    ("saelens topk", settle(architecture=None), "architecture is missing"),
    ("saelens topk", settle(whiten=1), "whiten=1 is not known here"),
    ("saelens topk", settle(normalize_activations="covariance_whitening"), "matrices"),
    ("saelens gated", without("r_mag"), "r_mag is missing"),
    ("saelens checkpoint of BatchTopK", without("topk_threshold"), "topk_threshold is missing"),
    ("saelens checkpoint of BatchTopK", lambda files: files["activation_scaler.json"].update(scaling_factor=0),
     "scaling_factor=0, expected a number above 0"),
    ("saelens topk", settle(normalize_activations="layer_norm"), "layer_norm.*own mean"),
    ("saelens topk", settle(normalize_activations="expected_average_only_in"), "factor"),
    ("saelens topk", settle(reshape_activations="hook_z"), "hook_z"),
    ("saelens before 6", settle(finetuning_scaling_factor=True), "finetuning_scaling_factor"),
    ("saelens before 6", lambda files: files["cfg.json"].update(reshape_activations="hook_z"), "updates have no heads"),
    ("saelens topk", put("threshold", torch.zeros(D_SAE)), "threshold"),
    ("saelens topk, rescaled", put("W_dec", torch.zeros(D_SAE, D_IN)), "row 0 is zero"),
    ("saelens jumprelu", settle(rescale_acts_by_decoder_norm=True), "no meaning for jumprelu"),
    ("saelens jumprelu", without("threshold"), "lacks threshold"),
    ("saelens before 6", settle(architecture="jumprelu"), "activation_fn_str='topk' of a jumprelu"),
    ("saelens before 6", settle(activation_fn_str="tanh-relu"), "'tanh-relu'"),
    ("saelens standard, of TopK", settle(activation_fn_kwargs={}), "k=None"),
    ("saelens standard", put("scaling_factor", torch.full((D_SAE,), 1.5)), "scaling_factor is not 1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "says"), MALFORMED)
def test_what_is_malformed_or_beyond_weights_is_one_line_that_names_the_file(kind, damage, says, tmp_path):
    theirs = KINDS[kind](0)
    damage(theirs.files)
    folder = theirs.write(tmp_path / "down.2.1")
    with pytest.raises(BundleError, match=says) as caught:
        read_sae(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_missing_or_cut_off_is_named(kind, tmp_path):
    theirs = KINDS[kind](0)
    for at, name in enumerate(theirs.files):
        for damage in ("missing", "cut", "noise"):
            folder = theirs.write(tmp_path / f"{at}-{damage}" / "down.2.1")
            if damage == "missing":
                (folder / name).unlink()
            else:
                whole = (folder / name).read_bytes()
                (folder / name).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\x80\xff not this")
            if (name, damage) == ("mean.pt", "missing"):  # published means are optional
                assert read_sae(folder).stats is None
                continue
            with pytest.raises(BundleError) as caught:
                read_sae(folder, format="auto" if (folder / name).exists() else bundle_format(kind))
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)


def bundle_format(kind: str) -> str:
    return kind.split(maxsplit=1)[0].rstrip(",")


def test_vit_prisma_is_refused_by_its_reason(tmp_path):
    (tmp_path / "config.json").write_text('{"normalize_activations": "layer_norm"}')
    (tmp_path / "weights.pt").write_bytes(b"")
    assert find_saes(tmp_path) == [tmp_path]
    with pytest.raises(BundleError, match=r"weights\.pt: of vit-prisma, which normalises each input.*layer_norm"):
        read_sae(tmp_path, "mid.0")


def test_a_folder_with_the_weights_of_two_formats_is_refused(tmp_path):
    foreign.sparsify(0).write(tmp_path / "down.2.1")
    with pytest.raises(BundleError, match="several"):
        read_sae(foreign.saelens(0, "topk").write(tmp_path / "down.2.1"))


def test_a_bundle_of_ours_says_where_it_sits_and_what_its_weights_mean(tmp_path):
    read = read_sae(foreign.saelens(0, "topk").write(tmp_path / "theirs"))
    save_bundle(
        tmp_path / "ours", hook_point="mid.0", hook_module=module_of("mid.0"), model_name=None, model_hash=None,
        architecture="topk", k=K, weights=read.weights, stats=None, provenance={}, name="mine",
    )  # fmt: skip
    moved = read_sae(tmp_path / "ours", "up.0.1")
    assert (moved.hook_point, moved.name) == ("up.0.1", "mine")
    config = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    for change, says in (
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
        ({"metadata": {"turbolens": {}}}, "hook_point"),
    ):
        (tmp_path / "ours" / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(BundleError, match=says):
            read_sae(tmp_path / "ours")


@settings(max_examples=40)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=40))
def test_hostile_bytes_never_raise_anything_else(cut, noise, tmp_path_factory):
    folder = foreign.saelens(0, "jumprelu").write(tmp_path_factory.mktemp("x") / "down.2.1")
    for name in ("cfg.json", "sae_weights.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:cut] + noise + whole[cut + len(noise) :])
        try:
            bundle = read_sae(folder)
        except BundleError as error:
            assert "\n" not in str(error)
        else:
            assert bundle.d_in == D_IN
        (folder / name).write_bytes(whole)


def test_weights_rewritten_in_place_are_seen(tmp_path):
    folder = foreign.sparsify(0).write(tmp_path / "down.2.1")
    before = read_sae(folder)
    path = folder / "sae.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert read_sae(folder).hash != before.hash
