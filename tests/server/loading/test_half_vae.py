"""A decoder with a scaled stream gives the same pictures, and stays within what it was scaled for."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from turbolens_server.loading.half_vae import SCALE, UnknownDecoder, scale_stream


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    for norm in (module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return vae.double().eval()


def largest(vae, latents):
    """Pictures, and the largest value that any block hands on."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: seen.append(float(out.abs().max())))
        for block in (vae.decoder.mid_block, *vae.decoder.up_blocks)
        for module in (*block.resnets, *(getattr(block, "upsamplers", None) or ()))
    ]
    with torch.no_grad():
        pictures = vae.decode(latents, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return pictures, max(seen)


def test_the_picture_is_the_same_and_the_stream_is_scaled(vae):
    latents = 5 * torch.randn(2, 4, 8, 8, dtype=torch.float64)
    scaled = copy.deepcopy(vae)
    scale_stream(scaled.decoder)
    (before, most), (after, less) = largest(vae, latents), largest(scaled, latents)
    assert torch.allclose(before, after, atol=1e-9 * before.abs().max())
    assert less == pytest.approx(SCALE * most, rel=1e-6)


def test_half_precision_decodes_what_overflowed(vae):
    """A stream of some 10^5, as SDXL's is said to have: infinite in half precision as it is, right when scaled."""
    large = copy.deepcopy(vae)
    with torch.no_grad():
        large.decoder.conv_in.weight.mul_(2e5)
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = large.decode(latents, return_dict=False)[0]
        half = copy.deepcopy(large).half()
        scaled = copy.deepcopy(large)
        scale_stream(scaled.decoder)
        scaled = scaled.half()
        overflowed = half.decode(latents.half(), return_dict=False)[0]
        found = scaled.decode(latents.half(), return_dict=False)[0]
    assert not torch.isfinite(overflowed).all()
    assert (found.double() - expected).abs().max() < 0.01 * expected.abs().max()


def test_another_decoder_is_left_as_it_is(vae):
    other = copy.deepcopy(vae)
    other.decoder.mid_block.resnets[0].output_scale_factor = 2.0
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UnknownDecoder, match="residual block"):
        scale_stream(other.decoder)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
