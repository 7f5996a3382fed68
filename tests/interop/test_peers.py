"""Folders that other projects' own code saved: their own `encode` beside what is served, row by row.

Each library is imported by its test, which is skipped where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from turbolens_server.sae.bundle import Bundle, BundleError, Nesting
from turbolens_server.sae.formats.read import read_sae
from turbolens_server.sae.sae import Sae

pytestmark = pytest.mark.interop
D_IN, D_SAE, K, ROWS = 24, 96, 5, 200


def need(module: str) -> ModuleType:
    return pytest.importorskip(module, exc_type=ImportError)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "unet.down_blocks.2.attentions.1"


def stir(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Random values for every parameter, so that no bias is 0 and no decoder row has norm 1 by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def rows() -> Tensor:
    return 2 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1))


def dense(bundle: Bundle, x: Tensor) -> Tensor:
    codes = Sae(bundle, torch.device("cpu")).encode(x)
    return torch.zeros(len(x), bundle.d_sae).scatter(1, codes.indices, codes.values)


def scattered(output: Any) -> Tensor:
    """Of libraries that answer with values and indices."""
    return torch.zeros(ROWS, D_SAE).scatter(1, output.top_indices, output.top_acts)


def same(folder: Path, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> Bundle:
    """Every row has the features of their encoder, and is reconstructed as by their decoder."""
    bundle, x = read_sae(folder), rows()
    with torch.no_grad():
        theirs, ours = encode(x).float(), dense(bundle, x)
        right = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4).all(1)
        assert (theirs > 0).any(1).float().mean() > 0.9
        assert int(right.sum()) == ROWS
        reconstructed = ours @ bundle.weights.W_dec + bundle.weights.b_dec
        assert torch.allclose(reconstructed, decode(theirs).float(), rtol=1e-3, atol=1e-3)
    return bundle


# sae-lens


def sae_lens_trained(architecture: str, **settings: Any) -> Any:
    sae_lens = need("sae_lens")
    config = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu", **settings}
    classes = {
        "standard": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig),
        "gated": (sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig),
        "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
        "jumprelu": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig),
        "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
        "matryoshka_batchtopk": (
            sae_lens.MatryoshkaBatchTopKTrainingSAE,
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        ),
    }
    trained, config_class = classes[architecture]
    sae = trained(config_class(**config))
    stir(sae)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.7)
    return sae


SAE_LENS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("topk", {"k": K}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
    ("jumprelu", {}),
    ("batchtopk", {"k": K}),
    ("batchtopk", {"k": K, "rescale_acts_by_decoder_norm": False}),
    ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [24, D_SAE]}),
]


@pytest.mark.parametrize(("architecture", "settings"), SAE_LENS)
def test_sae_lens_saved_for_inference(architecture, settings, folder):
    from sae_lens import SAE

    sae_lens_trained(architecture, **settings).save_inference_model(str(folder))
    theirs = SAE.load_from_disk(str(folder))
    same(folder, theirs.encode, theirs.decode)
    if "matryoshka_widths" in settings:
        assert read_sae(folder, hook_point="mid.0").nesting == Nesting(None, (24, D_SAE))


@pytest.mark.parametrize("factor", [None, 0.4])
@pytest.mark.parametrize(("architecture", "settings"), SAE_LENS)
def test_a_checkpoint_of_sae_lens_is_what_it_would_be_saved_as(architecture, settings, factor, folder):
    """Weights, configuration and the factor of the inputs as its trainer leaves them."""
    from sae_lens import SAE

    normalize = "none" if factor is None else "expected_average_only_in"
    sae = sae_lens_trained(architecture, normalize_activations=normalize, **settings)
    sae.save_model(str(folder))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor, "has_whitening": False}))
    if factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
    sae.save_inference_model(str(folder / "done"))
    theirs = SAE.load_from_disk(str(folder / "done"))
    same(folder, theirs.encode, theirs.decode)


def test_sae_lens_without_an_architecture_is_refused_as_there(folder):
    from sae_lens import SAE

    sae_lens_trained("topk", k=K).save_inference_model(str(folder))
    config = json.loads((folder / "cfg.json").read_text())
    del config["architecture"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(KeyError):
        SAE.load_from_disk(str(folder))
    with pytest.raises(BundleError, match="architecture is missing"):
        read_sae(folder)


# sparsify, and what grew out of it


def test_sparsify(folder):
    sparsify = need("sparsify")
    theirs = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K))
    stir(theirs)
    theirs.save_to_disk(folder)
    same(folder, lambda x: scattered(theirs.encode(x)), lambda z: z @ theirs.W_dec + theirs.b_dec)


@pytest.mark.parametrize("mean_center", [False, True])
@pytest.mark.parametrize("kind", ["TOPK", "MATRYOSHKA"])
def test_latentsae(kind, mean_center, folder):
    latentsae = need("latentsae")
    nested = {"matryoshka_sizes": f"4,32,{D_SAE}", "matryoshka_ks": f"2,3,{K}"} if kind == "MATRYOSHKA" else {}
    config = latentsae.SaeConfig(
        sae_type=latentsae.SaeType[kind], num_latents=D_SAE, k=2 * K, mean_center=mean_center, **nested
    )
    theirs = latentsae.Sae(D_IN, config)
    stir(theirs)
    if mean_center:
        theirs.input_mean.copy_(torch.linspace(-1, 1, D_IN))
    theirs.save_to_disk(folder)
    mean = theirs.input_mean if mean_center else 0
    bundle = same(folder, lambda x: scattered(theirs.encode(x)), lambda z: z @ theirs.W_dec + theirs.b_dec + mean)
    assert bundle.k == (K if nested else 2 * K)
    assert (bundle.nesting.prefixes if bundle.nesting else None) == ((32, D_SAE) if nested else None)


@pytest.mark.parametrize("kind", ["GATED", "JUMPRELU", "LISTA", "BATCHTOPK", "COSINE", "ABSTOPK"])
def test_what_latentsae_computes_otherwise_is_refused(kind, folder):
    latentsae = need("latentsae")
    latentsae.Sae(D_IN, latentsae.SaeConfig(sae_type=latentsae.SaeType[kind], num_latents=D_SAE, k=K)).save_to_disk(
        folder
    )
    with pytest.raises(BundleError, match=f"sae_type='{kind}'"):
        read_sae(folder)


# dictionary_learning


def dictionary(kind: str) -> Any:
    need("dictionary_learning")
    from dictionary_learning import dictionary as plain
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoder": lambda: plain.AutoEncoder(D_IN, D_SAE),
        "GatedAutoEncoder": lambda: plain.GatedAutoEncoder(D_IN, D_SAE),
        "JumpReluAutoEncoder": lambda: plain.JumpReluAutoEncoder(D_IN, D_SAE),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [24, D_SAE - 24]),
    }[kind]()
    stir(made)
    if "BatchTopK" in kind:
        made.threshold.fill_(0.8)
    return made


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)
def test_dictionary_learning(kind, folder):
    """What `load_dictionary` makes of the file: a plain dictionary's rows are normalised there."""
    made = dictionary(kind)
    from dictionary_learning.utils import load_dictionary

    folder.mkdir()
    torch.save(made.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "trainer_class": "X"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": None}))
    theirs, _ = load_dictionary(str(folder), "cpu")
    same(folder, theirs.encode, theirs.decode)


# llamascopium


@pytest.mark.parametrize("norm", [None, 7.0])
@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_llamascopium(kind, rescaled, norm, folder):
    need("llamascopium")
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    point = "unet.down_blocks.2.attentions.1"
    config = SAEConfig(
        hook_point_in=point, hook_point_out=point, d_model=D_IN, expansion_factor=D_SAE / D_IN, act_fn=kind, top_k=K,
        sparsity_include_decoder_norm=rescaled, norm_activation="dataset-wise" if norm else "inference",
    )  # fmt: skip
    made = SparseAutoEncoder(config)
    stir(made)
    if norm is not None:
        made.set_dataset_average_activation_norm({point: norm})
    made.save_pretrained(folder)
    config.save_hyperparameters(folder)
    theirs = SparseAutoEncoder.from_pretrained(str(folder))
    factor = D_IN**0.5 / norm if norm else 1.0
    # TopK selects among activations times their row's norm, and is told in that unit here.
    unit = theirs.decoder_norm() if kind == "topk" and rescaled else torch.ones(D_SAE)
    same(
        folder,
        lambda x: theirs.encode(theirs.normalize_activations({point: x})[point]) * unit,
        lambda z: theirs.decode(z / unit) / factor,
    )


# overcomplete, which imports torchvision for parts that encode nothing


@pytest.mark.parametrize("normalization", ["l2", "max_l2", "identity"])
@pytest.mark.parametrize("encoder", ["linear", "untied", "tied"])
@pytest.mark.parametrize("kind", ["SAE", "TopKSAE", "JumpSAE"])
def test_overcomplete(kind, encoder, normalization, folder):
    overcomplete = need("overcomplete.sae")
    more = {"top_k": K} if kind == "TopKSAE" else {}
    dictionary = {"normalization": normalization, "use_multiplier": True}
    theirs = getattr(overcomplete, kind)(D_IN, D_SAE, dictionary_params=dictionary, **more)
    if encoder != "linear":
        theirs = getattr(theirs, encoder)(bias=True)
    stir(theirs)
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "state_dict.pt")
    (folder / "config.json").write_text(json.dumps({"class": kind, "normalization": normalization, **more}))
    theirs.eval()
    same(folder, lambda x: theirs.encode(x)[1], theirs.decode)


# saev


def test_saev(folder):
    saev = need("saev.nn")
    from saev.config import SparseAutoencoder

    theirs = saev.SparseAutoencoder(SparseAutoencoder(d_vit=D_IN, exp_factor=D_SAE // D_IN))
    stir(theirs)
    saev.dump(str(folder / "sae.pt"), theirs)
    same(folder, lambda x: theirs(x)[1], theirs.decode)
