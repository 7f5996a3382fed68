"""Every shipped bundle loads in SAELens from its folder, and gives there what it gives here."""

from __future__ import annotations

import pytest
import torch

from turbolens_server.engine.load import embedded_saes
from turbolens_server.sae.bundle import load_bundle
from turbolens_server.sae.reference import decode_dense, encode_dense

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
