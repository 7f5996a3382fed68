"""What is written otherwise before it is compiled for a CPU, since the compiler does not find it by itself.

Of a group norm the compiler takes mean and variance pixel by pixel over a group's few channels, where most of a vector
is idle. Taken of every channel over the pixels, and then of a group over its channels, they fill it.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

_ATEN: Final = torch.ops.aten
_VECTOR: Final = 16
"""Channels of a group that fill a vector."""
_MANY: Final = 4096
"""Pixels from which it surely pays."""


def rewritten(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """With the group norms written out that gain by it."""
    written: torch.export.ExportedProgram = exported.run_decompositions({_ATEN.group_norm.default: group_norm})
    return written


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001  # as `torch.group_norm` has it
) -> Tensor:
    """`torch.group_norm` of x [B, C, ...]; written out where groups have few channels and many pixels."""
    batch, channels, *size = x.shape
    pixels, each = math.prod(size), channels // groups
    if each >= _VECTOR or pixels < _MANY:
        normalized: Tensor = torch.native_group_norm(x, weight, bias, batch, channels, pixels, groups, eps)[0]
        return normalized
    # Means over a group are products with constants: a product is computed once, and not anew for every pixel.
    to_group = torch.eye(groups, dtype=x.dtype).repeat_interleave(each, 0) / each  # [C, G]
    to_channel = torch.eye(groups, dtype=x.dtype).repeat_interleave(each, 1)  # [G, C]
    over, after = tuple(range(2, x.ndim)), [1] * len(size)
    centred = x - (x.mean(over) @ (to_group @ to_channel)).unflatten(1, (channels, *after))
    spread = centred.square().mean(over) @ to_group  # [B, G]
    if weight is not None:
        to_channel = to_channel * weight
    scaled: Tensor = centred * (torch.rsqrt(spread + eps) @ to_channel).unflatten(1, (channels, *after))
    return scaled if bias is None else scaled + bias.view(-1, *after)
