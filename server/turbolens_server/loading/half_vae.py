"""An SDXL-type VAE made to decode in half precision, exactly.

The residual stream of SDXL's decoder outgrows half precision (65,504), which is why models say `force_upcast` and
others decode in float32. Every reader of that stream is a group norm, which does not care for scale: with the stream
times s, and each norm's eps times s squared, all that the norms give is what it was. So it is enough to scale what is
written to the stream, its first convolution and every branch that is added to it, and the picture is the same in exact
arithmetic. The same goes for what a branch's first convolution hands to the norm behind it. With s a power of two,
nothing is rounded by it either, unless a weight becomes subnormal.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

SCALE: Final = 2.0**-5
"""Room for a stream 32 times as large as half precision's; weights of 0.002 and more stay normal numbers."""


class UnknownDecoder(ValueError):
    """The decoder has a part of another kind; the text names it."""


@torch.no_grad()
def scale_stream(decoder: Any, scale: float = SCALE) -> None:
    """Scale the residual stream of an `AutoencoderKL`'s decoder, in place.

    Raises:
        UnknownDecoder: before anything is changed.
    """
    resnets, attentions, upsamplers = _parts(decoder)
    convolutions = (convolution for resnet in resnets for convolution in (resnet.conv1, resnet.conv2))
    for layer in (decoder.conv_in, *convolutions, *(attention.to_out[0] for attention in attentions)):
        layer.weight.mul_(scale)
        layer.bias.mul_(scale)
    # These pass the stream on, already scaled.
    for layer in (*(r.conv_shortcut for r in resnets if r.conv_shortcut is not None), *(u.conv for u in upsamplers)):
        layer.bias.mul_(scale)
    norms = (norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2))
    for norm in (*norms, *(attention.group_norm for attention in attentions), decoder.conv_norm_out):
        norm.eps *= scale**2


def _parts(decoder: Any) -> tuple[list[ResnetBlock2D], list[Attention], list[Upsample2D]]:
    """The decoder's residual blocks, attentions and upsamplers."""
    kinds = ("UNetMidBlock2D", "UpDecoderBlock2D")
    blocks = (decoder.mid_block, *decoder.up_blocks)
    if other := [type(block).__name__ for block in blocks if type(block).__name__ not in kinds]:
        raise UnknownDecoder(f"a block of type {other[0]}")
    resnets = [resnet for block in blocks for resnet in block.resnets]
    attentions = [attention for attention in decoder.mid_block.attentions if attention is not None]
    upsamplers = [upsampler for block in decoder.up_blocks for upsampler in block.upsamplers or ()]
    for resnet in resnets:
        if resnet.output_scale_factor != 1 or resnet.time_emb_proj is not None or resnet.upsample or resnet.downsample:
            raise UnknownDecoder("a residual block of another kind")
    for attention in attentions:
        if attention.group_norm is None or not attention.residual_connection or attention.rescale_output_factor != 1:
            raise UnknownDecoder("an attention of another kind")
    for upsampler in upsamplers:
        if not upsampler.use_conv or upsampler.use_conv_transpose or upsampler.norm is not None:
            raise UnknownDecoder("an upsampler of another kind")
    return resnets, attentions, upsamplers
