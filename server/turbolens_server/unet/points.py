"""Hook points, and the one grammar of their names. Commands import this before torch.

A name is a transformer block, `down.2.1`, `mid.0`, `up.0.1`, or an attention layer in one: `up.0.1.attn2.3` is the
cross-attention of transformer layer 3 in block `up.0.1`. Each stands for a module of the `diffusers` U-Net. And
`up.0.1.attn2.3.z` is what goes into that layer's output projection: the outputs of its heads, side by side.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

Side = Literal["down", "mid", "up"]
Attention = Literal["attn1", "attn2"]
"""Self-attention and cross-attention of a transformer layer."""
ATTENTIONS: Final[tuple[Attention, ...]] = ("attn1", "attn2")

DEFAULT_HOOK_POINTS: Final = ("down.2.1", "mid.0", "up.0.0", "up.0.1")
"""The blocks that Surkov et al. (arXiv 2410.22366) found to matter most in SDXL Turbo."""

_MODULE: Final = re.compile(
    r"(?:(?P<side>down|up)_blocks[._](?P<i>\d+)[._]attentions[._](?P<j>\d+)|mid_block[._]attentions[._](?P<mid>\d+))"
    r"(?:[._]transformer_blocks[._](?P<layer>\d+)[._](?P<attention>attn[12])"
    r"(?P<z>[._](?:hook_)?z(?![A-Za-z0-9]))?)?"
)
_NAME: Final = re.compile(
    r"(?:(?P<side>down|up)\.(?P<i>\d+)\.(?P<j>\d+)|mid\.(?P<mid>\d+))"
    r"(?:\.(?P<attention>attn[12])\.(?P<layer>\d+)(?P<z>\.z)?)?"
)


@dataclasses.dataclass(frozen=True, slots=True)
class HookPoint:
    """A block whose update is read and steered."""

    name: str
    module: str
    d_model: int
    downscale: int
    """Picture pixels per cell of the grid, each way."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid for a picture of `height` x `width` pixels."""
        return height // self.downscale, width // self.downscale


def block_name(side: Side, i: int, j: int) -> str:
    """The name of attention j of block i on a side of the U-Net; there is one block in the middle."""
    return f"mid.{j}" if side == "mid" else f"{side}.{i}.{j}"


def attention_name(block: str, attention: Attention, layer: int) -> str:
    """The name of an attention layer in a block."""
    return f"{block}.{attention}.{layer}"


def z_name(layer: str) -> str:
    """The name of an attention layer's z."""
    return f"{layer}.z"


def pattern_name(layer: str) -> str:
    """The name under which a tap is shown an attention layer's pattern, [B, heads, P, sources] float32; it is no hook
    point."""
    return f"{layer}.pattern"


def values_name(layer: str) -> str:
    """The name under which a tap is shown its values, [B, sources, d_model]; it is no hook point."""
    return f"{layer}.v"


def inner_names(layer: str) -> tuple[str, str]:
    """Both."""
    return pattern_name(layer), values_name(layer)


def is_point(text: str) -> bool:
    """Whether a text is the name of a hook point; a model need not have it."""
    return _NAME.fullmatch(text) is not None


def block_of(point: str) -> str:
    """The block that a hook point is, or lies in: "up.0.1.attn2.3" -> "up.0.1"."""
    return point.partition(".attn")[0]


def is_attention(point: str) -> bool:
    """Whether a hook point is an attention layer within a block, or in one."""
    return block_of(point) != point


def is_z(point: str) -> bool:
    """Whether a hook point is what goes into the output projection of an attention layer."""
    return point.endswith(".z")


def hears_text(point: str) -> bool:
    """Whether a hook point is a cross-attention, or in one."""
    return ".attn2." in point


def layer_of(point: str) -> str:
    """The attention layer that a z is of: "up.0.1.attn2.3.z" -> "up.0.1.attn2.3"."""
    return point.removesuffix(".z")


def is_cross_attention(point: str) -> bool:
    """Whether a hook point is a cross-attention layer within a block."""
    return attention_name(block_of(point), "attn2", 0).rpartition(".")[0] == point.rpartition(".")[0]


def find_point(text: str) -> str | None:
    """The hook point that a text names: "unet.down_blocks.2.attentions.1_k10" and "down.2.1" are "down.2.1".

    Underscores in place of dots are understood too, as some tools write folders ("unet_down_blocks_2_attentions_1").
    """
    if module := _MODULE.search(text):
        return _name(module)
    return text if is_point(text) else None


def point_of_folder(folder: Path) -> str | None:
    """The hook point that a folder's name says, or else the nearest of its parents' names."""
    return next((point for part in reversed(folder.resolve().parts) if (point := find_point(part))), None)


def module_of(point: str) -> str:
    """ "down.2.1" -> "down_blocks.2.attentions.1". A z is no module's output: it is called "z" in that of its layer.

    Raises:
        ValueError: it is no name of a hook point.
    """
    parsed = _NAME.fullmatch(point)
    if parsed is None:
        raise ValueError(f"{point!r} is no block; names look like down.2.1, mid.0 or up.0.1")
    side, i, j, mid, attention, layer, z = parsed.group("side", "i", "j", "mid", "attention", "layer", "z")
    module = f"mid_block.attentions.{mid}" if mid else f"{side}_blocks.{i}.attentions.{j}"
    return f"{module}.transformer_blocks.{layer}.{attention}{z or ''}" if attention else module


def list_points(points: Iterable[str]) -> str:
    """The hook points for a message: a large U-Net has hundreds of attention layers."""
    names = list(points)
    blocks = [name for name in names if not is_attention(name)]
    layers = [name for name in names if is_attention(name) and not is_z(name)]
    inner = [name for name in names if is_z(name)]
    shown = ", ".join(blocks) + (f", and attention layers from {layers[0]} to {layers[-1]}" if layers else "")
    return shown + (f", and z of layers, as {inner[-1]}" if inner else "")


def _name(parsed: re.Match[str]) -> str:
    side, i, j, mid, attention, layer, z = parsed.group("side", "i", "j", "mid", "attention", "layer", "z")
    block = f"mid.{mid}" if mid else f"{side}.{i}.{j}"
    if not attention:
        return block
    name = f"{block}.{attention}.{layer}"
    return z_name(name) if z else name
