"""Regions in the whole network: diffusers' own forward with its own masks, and with plain softmax attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.regions import hear_regions
from turbolens_server.engine.types import Job, Region
from turbolens_server.steering.masks import Box, BoxMask, GridMask, PictureMask
from turbolens_server.unet.tapped import tapped_forward

PROMPT = "a big red star left of a small blue ring, night background"
EVERYWHERE = BoxMask((Box(0, 0, 1, 1),))
NOWHERE = GridMask({(n, n): np.zeros((n, n), np.float32) for n in (4, 8, 16, 32)})
SOFT = PictureMask(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
CORNER = BoxMask((Box(0, 0, 0.4, 0.7),))


class PlainAttention:
    """An attention processor of diffusers that is the definition: weights, exponentials, a sum."""

    def __init__(self, regions: tuple[Region, ...], tokens: int) -> None:
        self._regions, self._tokens = regions, tokens

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        assert attention_mask is None
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            to(x).unflatten(-1, (attn.heads, -1)).double()
            for to, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        logits = torch.einsum("bphd,bthd->bhpt", q, k) * attn.scale
        counts = torch.exp(logits - logits.amax(-1, keepdim=True))
        if encoder_hidden_states is not None:
            edge = int(hidden_states.shape[1] ** 0.5)
            masks = [torch.from_numpy(region.mask.on_grid(edge, edge)).flatten() for region in self._regions]
            for i, mask in enumerate(masks, 1):
                counts[..., i * self._tokens : (i + 1) * self._tokens] *= mask[:, None]
        out = torch.einsum("bhpt,bthd->bphd", counts / counts.sum(-1, keepdim=True), v)
        return attn.to_out[0](out.flatten(2).to(hidden_states.dtype))


@pytest.fixture
def passes(engine):
    """A function of regions: our pass, and what diffusers' own forward is given."""

    @torch.inference_mode()
    def run(*regions: Region):
        parts = engine.components
        job = Job(PROMPT, 7, 1, 128, 128, regions=regions)
        text, bias = hear_regions(
            parts.text.encode_all([PROMPT]), [job], Lanes.of([job]), parts.text, engine.info.region_strides
        )
        walk = engine.begin(text, [7], 1, bias=bias)
        t, sample = walk.timesteps[0], walk.noise
        ours = tapped_forward(parts.unet, sample, t, walk.conditions)
        heard = walk.conditions
        added = {"text_embeds": heard.pooled, "time_ids": heard.time_ids}
        return ours, (sample, t, heard.hidden), {"added_cond_kwargs": added, "return_dict": False}

    return run


def test_the_masks_of_diffusers_over_tokens(engine, passes):
    """It knows masks that are the same at every position: a region everywhere, and one nowhere."""
    ours, given, more = passes(Region(EVERYWHERE, "a green square"), Region(NOWHERE, "a pink cross"))
    tokens = given[2].shape[1] // 3
    mask = torch.tensor([[1] * 2 * tokens + [0] * tokens])
    with torch.inference_mode():
        theirs = engine.components.unet(*given, encoder_attention_mask=mask, **more)[0]
        unmasked = engine.components.unet(*given, **more)[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - unmasked).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("masks", [(SOFT,), (CORNER,), (SOFT, CORNER, NOWHERE)], ids=["soft", "hard", "several"])
def test_plain_softmax_attention_in_its_place(engine, passes, masks):
    regions = tuple(
        Region(mask, f"a {color} ring") for mask, color in zip(masks, ("red", "pink", "blue"), strict=False)
    )
    ours, given, more = passes(*regions)
    unet = engine.components.unet
    own = unet.attn_processors
    try:
        unet.set_attn_processor(PlainAttention(regions, given[2].shape[1] // (1 + len(regions))))
        with torch.inference_mode():
            theirs = unet(*given, **more)[0]
    finally:
        unet.set_attn_processor(own)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
