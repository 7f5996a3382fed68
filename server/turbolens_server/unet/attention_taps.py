"""Attention layers as hook points: what `attn1` or `attn2` of a transformer layer adds to its input.

`up.0.1.attn2.3` is the cross-attention of layer 3 in block `up.0.1`: the layer's output after its output projection,
before the residual add. `up.0.1.attn2.3.z` is what goes into that projection, where Kissane et al. put their SAEs
(arXiv 2406.17759): what is added there reaches the output through W_O, which is linear. As with blocks, the walk calls
the modules that diffusers' own forward calls, in its order; where z is tapped, those that its processor calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from turbolens_server.gating.gates import Gating
from turbolens_server.unet.points import (
    ATTENTIONS,
    HookPoint,
    attention_name,
    inner_names,
    module_of,
    pattern_name,
    values_name,
    z_name,
)

Tap = Callable[[str, Tensor], Tensor]
"""(hook point, update [B, P, width]) -> the update to add instead."""


def with_attention_points(unet: UNet2DConditionModel, blocks: Mapping[str, HookPoint]) -> dict[str, HookPoint]:
    """The blocks of `find_hook_points`, the attention layers in each and their z, in order of execution."""
    found = {}
    for name, block in blocks.items():
        transformer = unet.get_submodule(block.module)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        for i, layer in enumerate(transformer.transformer_blocks):
            for kind in ATTENTIONS if is_known(layer) else ():
                point = attention_name(name, kind, i)
                if is_open(getattr(layer, kind)):
                    z = z_name(point)
                    found[z] = HookPoint(z, module_of(z), width, block.downscale)
                found[point] = HookPoint(point, module_of(point), width, block.downscale)
        found[name] = block
    return found


def is_tapped(name: str, number: int, at: frozenset[str]) -> bool:
    """Whether an attention layer of transformer layer `number` in block `name`, or within one, is among `at`."""
    layers = tuple(attention_name(name, kind, number) for kind in ATTENTIONS)
    return any(point in layers or point.rpartition(".")[0] in layers for point in at)


def is_gated(name: str, number: int, gating: Gating | None) -> bool:
    """Whether the cross-attention of transformer layer `number` in block `name` has a learned gate."""
    return gating is not None and attention_name(name, "attn2", number) in gating


def run_layer(
    name: str,
    number: int,
    layer: Any,
    tokens: Tensor,
    text: Tensor,
    bias: Tensor | None,
    tap: Tap,
    at: frozenset[str],
    gating: Gating | None = None,
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
        gating: learned region gates, of the cross-attentions that have them; None: none.

    Returns:
        [B, P, width].
    """
    if not is_tapped(name, number, at) and not is_gated(name, number, gating):
        whole: Tensor = layer(tokens, encoder_hidden_states=text, encoder_attention_mask=bias)
        return whole
    parts = ((layer.attn1, layer.norm1, None, None), (layer.attn2, layer.norm2, text, bias))
    for kind, (attention, norm, context, added) in zip(ATTENTIONS, parts, strict=True):
        point, normed = attention_name(name, kind, number), norm(tokens)
        logits = added if gating is None or point not in gating else gating.bias(point, normed, added)
        update = _attend(point, attention, normed, context, logits, tap, at)
        tokens = (tap(point, update) if point in at else update) + tokens
    fed: Tensor = layer.ff(layer.norm3(tokens)) + tokens
    return fed


def _attend(
    point: str,
    attention: Any,
    tokens: Tensor,
    context: Tensor | None,
    bias: Tensor | None,
    tap: Tap,
    at: frozenset[str],
) -> Tensor:
    """An attention layer's update; `context` is what it attends to, None for the tokens themselves."""
    if at.isdisjoint((z_name(point), *inner_names(point))):
        whole: Tensor = attention(tokens, encoder_hidden_states=context, attention_mask=bias)
        return whole
    heard = tokens if context is None else context
    of_heads = attention.to_q(tokens), attention.to_k(heard), attention.to_v(heard)
    query, key, value = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in of_heads)
    if bias is not None:
        bias = attention.prepare_attention_mask(bias, heard.shape[1], heard.shape[0])
        bias = bias.unflatten(0, (-1, attention.heads))
    if values_name(point) in at:
        tap(values_name(point), of_heads[2])
    if pattern_name(point) in at:
        logits = query.float() @ key.float().transpose(2, 3) / query.shape[-1] ** 0.5
        tap(pattern_name(point), (logits if bias is None else logits + bias.float()).softmax(-1))
    z = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    z = z.to(query.dtype)
    projection, dropout = attention.to_out
    update: Tensor = dropout(projection(tap(z_name(point), z) if z_name(point) in at else z))
    return update


def is_open(attention: Any) -> bool:
    """Whether an attention's forward is what is written here."""
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(getattr(attention, part) is None for part in ("spatial_norm", "group_norm", "norm_q", "norm_k"))
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and len(attention.to_out) == 2
    )


def is_known(layer: Any) -> bool:
    """Whether a layer's forward is what `run_layer` does."""
    return (
        layer.norm_type == "layer_norm"
        and layer.attn2 is not None
        and layer.pos_embed is None
        and not layer.only_cross_attention
        and layer._chunk_size is None
    )
