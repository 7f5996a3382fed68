"""Attention layers as hook points: what `attn1` or `attn2` of a transformer layer adds to its input.

`up.0.1.attn2.3` is the cross-attention of layer 3 in block `up.0.1`: the layer's output after its output projection,
before the residual add. As with blocks, the walk calls the modules that diffusers' own forward calls, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from turbolens_server.unet.points import ATTENTIONS, HookPoint, attention_name, module_of


def with_attention_points(unet: UNet2DConditionModel, blocks: Mapping[str, HookPoint]) -> dict[str, HookPoint]:
    """The blocks of `find_hook_points` and the attention layers in each, in order of execution."""
    found = {}
    for name, block in blocks.items():
        transformer = unet.get_submodule(block.module)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        for i, layer in enumerate(transformer.transformer_blocks):
            for kind in ATTENTIONS if is_known(layer) else ():
                point = attention_name(name, kind, i)
                found[point] = HookPoint(point, module_of(point), width, block.downscale)
        found[name] = block
    return found


def is_tapped(name: str, number: int, at: frozenset[str]) -> bool:
    """Whether an attention layer of transformer layer `number` in block `name` is among the hook points `at`."""
    return not at.isdisjoint(attention_name(name, kind, number) for kind in ATTENTIONS)


def run_layer(
    name: str,
    number: int,
    layer: Any,
    tokens: Tensor,
    text: Tensor,
    bias: Tensor | None,
    tap: Callable[[str, Tensor], Tensor],
    at: frozenset[str],
) -> Tensor:
    """One transformer layer of a block.

    Args:
        name: of the block.
        number: of the layer in its block.
        layer: one of the block's `transformer_blocks`.
        tokens: [B, P, width].
        text: hidden states of the text encoders, [B, tokens, cross_attention_dim].
        bias: added to the logits of the cross-attention, [B, P, tokens]; None: nothing.
        tap: (hook point, update [B, P, width]) -> the update to add instead.
        at: names of the hook points that are tapped.

    Returns:
        [B, P, width].
    """
    if not is_tapped(name, number, at):
        whole: Tensor = layer(tokens, encoder_hidden_states=text, encoder_attention_mask=bias)
        return whole
    parts = ((layer.attn1, layer.norm1, None, None), (layer.attn2, layer.norm2, text, bias))
    for kind, (attention, norm, context, added) in zip(ATTENTIONS, parts, strict=True):
        update = attention(norm(tokens), encoder_hidden_states=context, attention_mask=added)
        point = attention_name(name, kind, number)
        tokens = (tap(point, update) if point in at else update) + tokens
    fed: Tensor = layer.ff(layer.norm3(tokens)) + tokens
    return fed


def is_known(layer: Any) -> bool:
    """Whether a layer's forward is what `run_layer` does."""
    return (
        layer.norm_type == "layer_norm"
        and layer.attn2 is not None
        and layer.pos_embed is None
        and not layer.only_cross_attention
        and layer._chunk_size is None
    )
