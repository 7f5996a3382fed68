"""The blocks of an SDXL-type U-Net as plain functions of tensors, with their projections joined and compiled.

What `diffusers` runs as three products (queries, keys, values of self-attention) is one here, and the keys and values
of every cross-attention in the U-Net, which depend on the text alone, are one product at the start of a pass. The
joined weights are what the modules' own weights become views of: nothing is held twice.

The functions take weights as arguments, so one compilation serves all blocks of a shape, and compiling takes as long
as there are different blocks rather than as there are blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from turbolens_server.gating.gates import Gating
from turbolens_server.unet.attention_taps import is_gated, is_known, is_tapped, run_layer
from turbolens_server.unet.backend import BackendError, OnUpdate
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.tapped import attention_blocks

_COMPILATIONS: Final = 256
"""Most compilations of one function: each shape of a block counts, for one picture and for several."""


class WeightBias(NamedTuple):
    """A linear map or a convolution, or the last part of a norm."""

    weight: Tensor
    bias: Tensor | None


class LayerWeights(NamedTuple):
    """A transformer layer of width d."""

    norm1: WeightBias
    qkv: WeightBias  # [3 d, d]
    out1: WeightBias
    norm2: WeightBias
    query: WeightBias
    out2: WeightBias
    norm3: WeightBias
    ff_in: WeightBias  # [8 d, d]: values and gates of a GEGLU
    ff_out: WeightBias


class ResnetWeights(NamedTuple):
    """A residual block of convolutions."""

    norm1: WeightBias
    conv1: WeightBias
    time: WeightBias
    norm2: WeightBias
    conv2: WeightBias
    shortcut: WeightBias | None
    """A 1 x 1 convolution where the number of channels changes."""


def transformer_layer(
    tokens: Tensor, text: Tensor, w: LayerWeights, heads: int, eps: float, bias: Tensor | None = None
) -> Tensor:
    """Self-attention, cross-attention, feed-forward.

    Args:
        tokens: [B, P, d].
        text: this layer's keys and values of the text, [B, tokens, 2 d].
        w: weights.
        heads: of both attentions.
        eps: of the norms.
        bias: added to the logits of the cross-attention, [B, P, tokens].
    """
    q, k, v = F.linear(_layer_norm(tokens, w.norm1, eps), *w.qkv).chunk(3, -1)
    tokens = F.linear(_attention(q, k, v, heads), *w.out1) + tokens
    k, v = text.chunk(2, -1)
    q = F.linear(_layer_norm(tokens, w.norm2, eps), *w.query)
    tokens = F.linear(_attention(q, k, v, heads, bias), *w.out2) + tokens
    values, gates = F.linear(_layer_norm(tokens, w.norm3, eps), *w.ff_in).chunk(2, -1)
    return F.linear(values * F.gelu(gates), *w.ff_out) + tokens


def enter(hidden: Tensor, norm: WeightBias, projection: WeightBias, groups: int, eps: float) -> Tensor:
    """What comes before a block's layers: [B, C, h, w] -> [B, h * w, d]."""
    tokens = F.group_norm(hidden, groups, *norm, eps).flatten(2).transpose(1, 2)
    return F.linear(tokens, *projection)


def leave(update: Tensor, hidden: Tensor) -> Tensor:
    """Add a block's update [B, h * w, C] to its input [B, C, h, w]."""
    grid: Tensor = update.transpose(1, 2).unflatten(2, hidden.shape[2:])
    return grid + hidden


def resnet(hidden: Tensor, embedding: Tensor, w: ResnetWeights, groups: int, eps: float) -> Tensor:
    """A residual block: hidden [B, C, h, w] and the time's embedding [B, E] -> [B, C', h, w]."""
    x = F.conv2d(F.silu(F.group_norm(hidden, groups, *w.norm1, eps)), *w.conv1, padding=1)
    x = x + F.linear(F.silu(embedding), *w.time)[:, :, None, None]
    x = F.conv2d(F.silu(F.group_norm(x, groups, *w.norm2, eps)), *w.conv2, padding=1)
    return (hidden if w.shortcut is None else F.conv2d(hidden, *w.shortcut)) + x


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a pass."""

    hidden: Tensor  # [B, tokens, cross_attention_dim]
    keys_values: Mapping[Any, Tensor]
    """By layer, [B, tokens, 2 d]."""
    bias: Mapping[tuple[int, int], Tensor]
    """See :class:`Conditions`."""
    gating: Gating | None


class FusedBlocks:
    """What :func:`turbolens_server.unet.tapped.tapped_forward` runs in place of the modules of one U-Net."""

    def __init__(self, unet: UNet2DConditionModel, **options: Any) -> None:
        """Join the U-Net's weights, where it is.

        Args:
            unet: to take the weights of; its modules stay as they were, in what they do.
            options: of `torch.compile`.

        Raises:
            BackendError: it has a part that is not written here.
        """
        unet.to(memory_format=torch.channels_last)
        self._transformer_layer, self._enter, self._leave, self._resnet = (
            torch.compile(function, fullgraph=True, dynamic=False, **options)
            for function in (transformer_layer, enter, leave, resnet)
        )
        self._resnets = {module: _resnet_weights(name, module) for name, module in unet.named_modules()
                         if isinstance(module, ResnetBlock2D)}  # fmt: skip
        self._layers: dict[Any, LayerWeights] = {}
        of_text: dict[Any, list[nn.Linear]] = {}
        for name, _, block in attention_blocks(unet):
            for layer in block.transformer_blocks:
                self._layers[layer] = _layer_weights(name, layer)
                of_text[layer] = [layer.attn2.to_k, layer.attn2.to_v]
        # Of all layers below one another, [sum of 2 d, cross_attention_dim].
        self._text_weight = _join([linear for linears in of_text.values() for linear in linears])
        self._text_widths = [sum(linear.out_features for linear in linears) for linears in of_text.values()]

    def prepare(self, conditions: Conditions) -> Text:
        """Keys and values of every layer from the text."""
        parts = F.linear(conditions.hidden, self._text_weight).split(self._text_widths, -1)
        return Text(conditions.hidden, dict(zip(self._layers, parts, strict=True)), conditions.bias, conditions.gating)

    def resnet(self, module: ResnetBlock2D, hidden: Tensor, embedding: Tensor) -> Tensor:
        """A residual block of the U-Net."""
        _let_batch_vary(hidden, embedding)
        norm = module.norm1
        with _many_compilations():
            out: Tensor = self._resnet(hidden, embedding, self._resnets[module], norm.num_groups, norm.eps)
        return out

    def transformer(
        self,
        name: str,
        module: Transformer2DModel,
        hidden: Tensor,
        text: Text,
        tap: OnUpdate,
        at: frozenset[str],
    ) -> Tensor:
        """A transformer block of the U-Net, with its update and those of its attention layers passed through `tap`."""
        grid = (hidden.shape[2], hidden.shape[3])
        bias = text.bias.get(grid)
        norm = module.norm

        def steer(point: str, update: Tensor) -> Tensor:
            return tap(point, update, grid)

        with _many_compilations():
            _let_batch_vary(hidden)
            tokens = self._enter(hidden, _weight_bias(norm), _as_linear(module.proj_in), norm.num_groups, norm.eps)
            for number, layer in enumerate(module.transformer_blocks):
                if is_tapped(name, number, at) or is_gated(name, number, text.gating):
                    tokens = run_layer(name, number, layer, tokens, text.hidden, bias, steer, at, text.gating)
                    continue
                keys_values, weights = text.keys_values[layer], self._layers[layer]
                _let_batch_vary(tokens, keys_values, *(() if bias is None else (bias,)))
                heads, eps = layer.attn1.heads, layer.norm1.eps
                tokens = self._transformer_layer(tokens, keys_values, weights, heads, eps, bias)
            update = F.linear(tokens, *_as_linear(module.proj_out))
            if name in at:
                update = tap(name, update, grid)
            _let_batch_vary(update, hidden)
            out: Tensor = self._leave(update, hidden)
        return out


def _let_batch_vary(*tensors: Tensor) -> None:
    """Compile for any number of pictures from 2 up at once; one picture is compiled for by itself, and is faster."""
    for tensor in tensors:
        if len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)


def _many_compilations() -> Any:
    return torch._dynamo.config.patch(recompile_limit=_COMPILATIONS)


def _layer_norm(tokens: Tensor, norm: WeightBias, eps: float) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], *norm, eps)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention over [B, N, d] each, d split among heads; a bias [B, N of q, N of k] is every head's."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    bias = None if bias is None else bias[:, None]
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


# Taking the weights


def _weight_bias(module: Any) -> WeightBias:
    return WeightBias(module.weight, module.bias)


def _as_linear(module: Any) -> WeightBias:
    """A linear layer, or a 1 x 1 convolution as one."""
    return WeightBias(module.weight.flatten(1), module.bias)


def _join(linears: Sequence[nn.Linear]) -> Tensor:
    """Weights below one another, [sum of out, in]; those of the layers become views of it."""
    joined = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, joined.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    return joined


def _need(name: str, **conditions: bool) -> None:
    if wrong := [what for what, good in conditions.items() if not good]:
        raise BackendError(f"{name} is not the block that is compiled ({', '.join(wrong)}); use --backend torch")


def _layer_weights(name: str, layer: Any) -> LayerWeights:
    first, second = layer.attn1, layer.attn2
    net: Any = getattr(layer.ff, "net", ())
    _need(f"a layer of {name}", norms=is_known(layer))
    _need(
        f"a layer of {name}",
        feed_forward=len(net) == 3 and isinstance(net[0], GEGLU) and isinstance(net[2], nn.Linear),
        biases=all(linear.bias is None for attention in (first, second)
                   for linear in (attention.to_q, attention.to_k, attention.to_v)),
        attention=all(attention.norm_q is None and attention.norm_k is None and attention.group_norm is None
                      and not attention.norm_cross and not attention.residual_connection
                      and attention.rescale_output_factor == 1 for attention in (first, second)),
        heads=first.heads == second.heads,
        eps=layer.norm1.eps == layer.norm2.eps == layer.norm3.eps,
    )  # fmt: skip
    return LayerWeights(
        norm1=_weight_bias(layer.norm1),
        qkv=WeightBias(_join([first.to_q, first.to_k, first.to_v]), None),
        out1=_weight_bias(first.to_out[0]),
        norm2=_weight_bias(layer.norm2),
        query=_weight_bias(second.to_q),
        out2=_weight_bias(second.to_out[0]),
        norm3=_weight_bias(layer.norm3),
        ff_in=_weight_bias(net[0].proj),
        ff_out=_weight_bias(net[2]),
    )


def _resnet_weights(name: str, module: ResnetBlock2D) -> ResnetWeights:
    _need(
        name,
        time_embedding=module.time_embedding_norm == "default" and module.time_emb_proj is not None,
        resampling=module.upsample is None and module.downsample is None,
        activation=isinstance(module.nonlinearity, nn.SiLU) and not module.skip_time_act,
        scale=module.output_scale_factor == 1,
        norms=(module.norm1.num_groups, module.norm1.eps) == (module.norm2.num_groups, module.norm2.eps),
    )
    return ResnetWeights(
        norm1=_weight_bias(module.norm1),
        conv1=_weight_bias(module.conv1),
        time=_weight_bias(module.time_emb_proj),
        norm2=_weight_bias(module.norm2),
        conv2=_weight_bias(module.conv2),
        shortcut=None if module.conv_shortcut is None else _weight_bias(module.conv_shortcut),
    )
