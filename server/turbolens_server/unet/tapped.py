"""The U-Net with its hook points in the open: one explicit walk over the modules of a `diffusers` U-Net.

The walk calls the same modules in the same order as `UNet2DConditionModel.forward`, and hands the *update* of each
tapped transformer block (what it adds to its input) to a function, whose answer is added instead. Nothing is
registered on the modules and nothing is kept between calls, so requests cannot see each other, the walk can stop
early, and a compiler or exporter sees plain code. Tests hold it to diffusers' own forward, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from turbolens_server.unet.attention_taps import run_layer
from turbolens_server.unet.backend import OnUpdate
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.points import HookPoint, Side, block_name, block_of, module_of


class UnsupportedUNet(ValueError):
    """The U-Net has a part that this walk does not know; the text names it."""


class Blocks(Protocol):
    """How the walk runs the blocks that a U-Net consists of."""

    def prepare(self, conditions: Conditions) -> Any:
        """What `transformer` takes as text, once a pass."""

    def resnet(self, module: ResnetBlock2D, hidden: Tensor, embedding: Tensor) -> Tensor:
        """A residual block: [B, C, h, w] and the time's embedding [B, E] -> [B, C', h, w]."""
        ...

    def transformer(
        self, name: str, module: Transformer2DModel, hidden: Tensor, text: Any, tap: OnUpdate, at: frozenset[str]
    ) -> Tensor:
        """A transformer block [B, C, h, w] -> [B, C, h, w], with the updates of the hook points `at` given to `tap`."""
        ...


def attention_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, int, Transformer2DModel]]:
    """Every transformer block in order of execution: (hook point, halvings of the latent there, module)."""
    levels = len(unet.down_blocks)
    sides: list[tuple[Side, int, int, Any]] = [
        *(("down", i, i, block) for i, block in enumerate(unet.down_blocks)),
        ("mid", 0, levels - 1, unet.mid_block),
        *(("up", i, levels - 1 - i, block) for i, block in enumerate(unet.up_blocks)),
    ]
    for side, i, halvings, block in sides:
        for j, attention in enumerate(getattr(block, "attentions", None) or ()):
            yield block_name(side, i, j), halvings, attention


def find_hook_points(unet: UNet2DConditionModel, vae_downscale: int) -> dict[str, HookPoint]:
    """Every block that can be tapped, by name."""
    found = {}
    for name, halvings, attention in attention_blocks(unet):
        width = attention.config.num_attention_heads * attention.config.attention_head_dim
        d_model = attention.config.in_channels or width
        found[name] = HookPoint(name, module_of(name), d_model, vae_downscale * 2**halvings)
    return found


def check_supported(unet: UNet2DConditionModel) -> None:
    """Raise UnsupportedUNet where the walk would not be the model's own forward."""
    config = unet.config
    problems = {
        "addition_embed_type": config.addition_embed_type != "text_time",
        "class_embed_type": config.class_embed_type is not None or config.num_class_embeds is not None,
        "encoder_hid_dim_type": config.encoder_hid_dim_type is not None,
        "center_input_sample": config.center_input_sample,
        "time_embedding_act_fn": unet.time_embed_act is not None,
        "mid_block_type": config.mid_block_type not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "down_block_types": not set(config.down_block_types) <= {"DownBlock2D", "CrossAttnDownBlock2D"},
        "up_block_types": not set(config.up_block_types) <= {"UpBlock2D", "CrossAttnUpBlock2D"},
    }
    if wrong := [f"{name}={config[name]!r}" for name, bad in problems.items() if bad]:
        raise UnsupportedUNet(f"not an SDXL-type U-Net: {', '.join(wrong)}")


def tapped_forward(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    *,
    tap: OnUpdate | None = None,
    at: frozenset[str] = frozenset(),
    stop_after: str | None = None,
    blocks: Blocks | None = None,
) -> Tensor | None:
    """One pass of the U-Net.

    Args:
        unet: an SDXL-type U-Net, see :func:`check_supported`.
        sample: scaled latents [B, C, h, w]; h and w divisible by 2 ** (levels - 1).
        timestep: [] or [B].
        conditions: what the U-Net hears.
        tap: called at every hook point in `at`.
        at: names of hook points.
        stop_after: end the pass after the block of this hook point, where only updates are wanted.
        blocks: how to run the blocks; None: the U-Net's own modules.

    Returns:
        The prediction [B, C, h, w]; None where the pass was stopped.
    """
    embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), conditions.guidance)
    text = conditions.hidden
    added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
    embedding = embedding + unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added)

    blocks = blocks or OwnModules()
    context = blocks.prepare(conditions)
    on_update = tap or _add_as_it_is
    stop_after = block_of(stop_after) if stop_after else None

    def attend(name: str, attention: Transformer2DModel, hidden: Tensor) -> Tensor:
        return blocks.transformer(name, attention, hidden, context, on_update, at)

    hidden = unet.conv_in(sample)
    skips = [hidden]
    for i, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", None)
        for j, resnet in enumerate(block.resnets):
            hidden = blocks.resnet(resnet, hidden, embedding)
            if attentions is not None:
                hidden = attend(block_name("down", i, j), attentions[j], hidden)
                if stop_after == block_name("down", i, j):
                    return None
            skips.append(hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
            skips.append(hidden)

    if unet.mid_block is not None:
        hidden = blocks.resnet(unet.mid_block.resnets[0], hidden, embedding)
        pairs = zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True)
        for j, (attention, resnet) in enumerate(pairs):
            hidden = attend(block_name("mid", 0, j), attention, hidden)
            if stop_after == block_name("mid", 0, j):
                return None
            hidden = blocks.resnet(resnet, hidden, embedding)

    for i, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", None)
        for j, resnet in enumerate(block.resnets):
            hidden = blocks.resnet(resnet, torch.cat([hidden, skips.pop()], dim=1), embedding)
            if attentions is not None:
                hidden = attend(block_name("up", i, j), attentions[j], hidden)
                if stop_after == block_name("up", i, j):
                    return None
        for upsampler in block.upsamplers or ():
            hidden = upsampler(hidden, None)

    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    prediction: Tensor = unet.conv_out(hidden)
    return prediction


def _add_as_it_is(_: str, update: Tensor, __: tuple[int, int]) -> Tensor:
    """The tap of a pass that has none."""
    return update


class OwnModules:
    """The U-Net's modules, called as `UNet2DConditionModel.forward` calls them."""

    def __init__(self, bias: Mapping[str, Tensor] | None = None) -> None:
        """`bias` by block in place of the conditions', which looks it up by its grid and so fixes the size: an exported
        graph is for all of them."""
        self._bias = bias

    def prepare(self, conditions: Conditions) -> Conditions:
        return conditions

    def resnet(self, module: ResnetBlock2D, hidden: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = module(hidden, embedding)
        return out

    def transformer(
        self, name: str, module: Transformer2DModel, hidden: Tensor, text: Any, tap: OnUpdate, at: frozenset[str]
    ) -> Tensor:
        bias = self._bias[name] if self._bias else text.bias_on((hidden.shape[2], hidden.shape[3]))
        if text.gating is None and name not in {block_of(point) for point in at}:
            heard = {"encoder_hidden_states": text.hidden, "encoder_attention_mask": bias}
            attended: Tensor = module(hidden, **heard, return_dict=False)[0]
            return attended
        return _tapped_attention(name, module, hidden, text, bias, tap, at)


def _tapped_attention(
    name: str,
    attention: Transformer2DModel,
    hidden: Tensor,
    text: Conditions,
    bias: Tensor | None,
    tap: OnUpdate,
    at: frozenset[str],
) -> Tensor:
    """`Transformer2DModel.forward` with updates passed through `tap`; the block's own is `proj_out`'s output.

    `bias` is added to the logits of its cross-attentions; what `text` says of it is not looked at."""
    batch, _, height, width = hidden.shape
    grid = (height, width)
    tokens, inner = attention._operate_on_continuous_inputs(hidden)
    for number, layer in enumerate(attention.transformer_blocks):
        heard = (text.hidden, bias)
        tokens = run_layer(name, number, layer, tokens, *heard, lambda point, x: tap(point, x, grid), at, text.gating)
    if attention.use_linear_projection:
        update = attention.proj_out(tokens)
    else:
        image = tokens.reshape(batch, height, width, inner).permute(0, 3, 1, 2).contiguous()
        update = attention.proj_out(image).flatten(2).transpose(1, 2)
    if name in at:
        update = tap(name, update, grid)
    added: Tensor = update.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
    return added + hidden
