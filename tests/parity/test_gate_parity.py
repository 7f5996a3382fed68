"""Learned region gates in the whole network: diffusers' own forward, with attention by its definition in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.regions import hear_regions
from turbolens_server.engine.types import Job, Region
from turbolens_server.gating import twin
from turbolens_server.gating.bundle import load_gates
from turbolens_server.steering.masks import PictureMask
from turbolens_server.unet.tapped import tapped_forward

PROMPT = "a big red star left of a small blue ring, night background"
SOFT = PictureMask(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))


class GatedAttention:
    """An attention processor of diffusers that is the definition: gates by their formula, weights, exponentials."""

    def __init__(self, head, threshold: float, weights: torch.Tensor) -> None:
        self._head, self._threshold, self._weights = head, threshold, weights

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        assert attention_mask is None
        x, text = hidden_states, encoder_hidden_states
        mlps = [{name: t.double().numpy() for name, t in part._asdict().items()} for part in self._head[:2]]
        features = np.stack([twin.network(p, mlps[0]) for p in x[0].double().numpy()])
        tokens = np.stack([twin.network(t, mlps[1]) for t in text[0].double().numpy()])
        likely = 1 / (1 + np.exp(-(features @ tokens.T / np.sqrt(tokens.shape[1]) + self._head.bias.item())))
        weights = self._weights.numpy()
        opened = [
            twin.opened(row.tolist(), self._threshold, (w > 0).tolist()) for row, w in zip(likely, weights, strict=True)
        ]
        q, k, v = (
            to(part).unflatten(-1, (attn.heads, -1)).double()
            for to, part in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
        )
        logits = torch.einsum("bphd,bthd->bhpt", q, k) * attn.scale
        counts = torch.exp(logits - logits.amax(-1, keepdim=True)) * torch.tensor(np.array(opened) * weights)
        out = torch.einsum("bhpt,bthd->bphd", counts / counts.sum(-1, keepdim=True), v)
        return attn.to_out[0](out.flatten(2).to(x.dtype))


@pytest.mark.parametrize("regions", [(), (Region(SOFT, "a pink cross"),)], ids=["gates", "gates and a region"])
def test_the_definition_in_its_place(gated_engine, gate_folder, regions):
    parts, bundle = gated_engine.components, load_gates(gate_folder)
    job = Job(PROMPT, 7, 1, 128, 128, regions=regions, gate=True)
    unet, own = parts.unet, parts.unet.attn_processors
    with torch.inference_mode():
        text, bias = hear_regions(
            parts.text.encode_all([PROMPT]), [job], Lanes.of([job]), parts.text, gated_engine.info.region_strides
        )
        walk = gated_engine.begin(text, [7], 1, bias=bias, gate=True)
        t, sample, heard = walk.timesteps[0], walk.noise, walk.conditions
        ours = tapped_forward(unet, sample, t, heard)
        added = {"text_embeds": heard.pooled, "time_ids": heard.time_ids}
        edge = gated_engine.info.default_size[0] // gated_engine.info.hook_points[0].downscale
        tokens = heard.hidden.shape[1]
        weights = bias[edge, edge][0].exp() if bias else torch.ones(edge * edge, tokens)

        def processor(name: str):
            if ".attn2." not in name:
                return own[name]
            head = "mid" if name.startswith("mid") else "outer"
            return GatedAttention(bundle.heads[head], bundle.threshold, weights)

        given = {"added_cond_kwargs": added, "return_dict": False}
        plain = unet(sample, t, heard.hidden, **given)[0]
        try:
            unet.set_attn_processor({name: processor(name) for name in own})
            theirs = unet(sample, t, heard.hidden, **given)[0]
        finally:
            unet.set_attn_processor(own)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * theirs.abs().max()
