"""Every shipped bundle loads in SAELens from its folder, and gives there what it gives here; and the way back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from turbolens_server.loading.hub import embedded_saes
from turbolens_server.sae.bundle import SaeWeights, load_bundle, save_bundle
from turbolens_server.sae.formats.read import read_sae
from turbolens_server.sae.twin import decode_dense, encode_dense

pytestmark = pytest.mark.interop
FOLDERS = sorted(embedded_saes().glob("*/"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_bundle_is_the_same_in_sae_lens(folder):
    from sae_lens import SAE

    theirs = SAE.load_from_disk(str(folder))
    bundle = load_bundle(folder)
    # Inputs that look like data: around b_dec, along decoder rows of features that fire, as strongly as they do.
    generator = torch.Generator().manual_seed(0)
    largest = torch.from_numpy(bundle.stats.max)
    firing = largest.nonzero()[:, 0]
    rows = firing[torch.randint(len(firing), (64, 6), generator=generator)]
    strength = largest[rows] * torch.rand(64, 6, generator=generator)
    x = bundle.weights.b_dec + (bundle.weights.W_dec[rows] * strength[..., None]).sum(1)
    with torch.no_grad():
        z = theirs.encode(x)
        assert torch.allclose(z, encode_dense(bundle, x), rtol=1e-4, atol=1e-3)
        assert torch.allclose(theirs.decode(z), decode_dense(bundle, z), rtol=1e-4, atol=1e-3)
    assert (z > 0).any()
    assert theirs.cfg.metadata.turbolens["hook_point"] == bundle.hook_point


def random_weights(d_in: int = 16, d_sae: int = 40) -> SaeWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return SaeWeights(draw(d_in, d_sae), draw(d_sae), draw(d_sae, d_in), draw(d_in), draw(d_sae))


def test_a_jumprelu_bundle_is_the_same_in_sae_lens_and_after_it_saved_it(tmp_path: Path):
    """Ours to theirs, saved by them, and read back: negative thresholds and unnormalised rows included."""
    from sae_lens import SAE

    save_bundle(
        tmp_path / "ours", hook_point="up.0.1", hook_module="up_blocks.0.attentions.1", model_name="m", model_hash="h",
        architecture="jumprelu", k=None, weights=random_weights(), stats=None, provenance={},
    )  # fmt: skip
    ours = load_bundle(tmp_path / "ours")
    theirs = SAE.load_from_disk(str(tmp_path / "ours"))
    theirs.save_model(tmp_path / "theirs")
    back = read_sae(tmp_path / "theirs")
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = theirs.encode(x)
        for bundle in (ours, back):
            assert torch.allclose(z, encode_dense(bundle, x), rtol=1e-4, atol=1e-4)
            assert torch.allclose(theirs.decode(z), decode_dense(bundle, z), rtol=1e-4, atol=1e-4)
    assert 0 < (z > 0).float().mean() < 1
    assert (back.hook_point, back.architecture) == ("up.0.1", "jumprelu")


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "topk, rescaled", "jumprelu"])
def test_what_sae_lens_saves_is_read_as_it_computes(kind, centred, tmp_path: Path):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    size = {"d_in": 16, "d_sae": 40, "apply_b_dec_to_input": centred}
    made = {
        "standard": lambda: StandardSAE(StandardSAEConfig(**size)),
        "topk": lambda: TopKSAE(TopKSAEConfig(k=5, **size)),
        "topk, rescaled": lambda: TopKSAE(TopKSAEConfig(k=5, rescale_acts_by_decoder_norm=True, **size)),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**size)),
    }[kind]()
    weights = random_weights()
    if kind != "jumprelu":
        weights = dataclasses.replace(weights, threshold=None)
    made.load_state_dict(weights.tensors())
    made.save_model(tmp_path / "up.0.1")
    bundle = read_sae(tmp_path / "up.0.1")
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = made.encode(x)
        assert torch.allclose(z, encode_dense(bundle, x), rtol=1e-4, atol=1e-4)
        assert torch.allclose(made.decode(z), decode_dense(bundle, z), rtol=1e-4, atol=1e-4)
    assert (z > 0).any()
