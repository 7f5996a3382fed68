"""Draw scenes as pictures: signed distance fields, a batch at a time, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from turbolens_training.mini.scenes import (
    BACKGROUND,
    BACKGROUNDS,
    COLORS,
    COUNT,
    LAYOUT,
    LAYOUTS,
    SHAPES,
    SIZES,
    STYLE,
    STYLES,
    TEXTURES,
    thing_column,
)

_RGB: Final = {
    "red": (0.88, 0.12, 0.12), "yellow": (0.98, 0.86, 0.12), "green": (0.13, 0.62, 0.22),
    "blue": (0.12, 0.3, 0.88), "purple": (0.52, 0.16, 0.72), "pink": (0.98, 0.55, 0.74),
    "white": (0.98, 0.98, 0.98), "black": (0.07, 0.07, 0.09),
}  # fmt: skip
_GROUND: Final = {  # top and bottom of the background's gradient
    "sky": ((0.42, 0.68, 0.95), (0.85, 0.94, 1.0)), "grass": ((0.66, 0.84, 0.45), (0.25, 0.55, 0.2)),
    "night": ((0.04, 0.05, 0.18), (0.15, 0.12, 0.36)), "sunset": ((0.98, 0.76, 0.35), (0.74, 0.3, 0.4)),
    "snow": ((0.82, 0.87, 0.93), (0.96, 0.97, 0.98)),
}  # fmt: skip
_LIGHT: Final = {  # each background's light, which falls on the things
    "sky": (1.0, 1.0, 1.0), "grass": (0.97, 1.0, 0.95), "night": (0.82, 0.82, 0.95),
    "sunset": (1.0, 0.9, 0.8), "snow": (0.97, 0.98, 1.0),
}  # fmt: skip
_CENTER: Final = {  # of the first and of the second thing; x to the right, y down, the picture is [-1, 1] squared
    "left": ((-0.42, 0.0), (0.0, 0.0)), "right": ((0.42, 0.0), (0.0, 0.0)), "top": ((0.0, -0.42), (0.0, 0.0)),
    "bottom": ((0.0, 0.42), (0.0, 0.0)), "center": ((0.0, 0.0), (0.0, 0.0)),
    "left of": ((-0.5, 0.0), (0.5, 0.0)), "above": ((0.0, -0.5), (0.0, 0.5)),
}  # fmt: skip
_RADIUS: Final = {"small": 0.4, "big": 0.66}
_PAIR_SCALE: Final = 0.8
_STRIPES: Final = 7.0


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.8


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.72


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(0.866 * x.abs() - 0.5 * y - 0.40, y - 0.62)


def _star(x: Tensor, y: Tensor) -> Tensor:
    outer, inner, sector = 0.97, 0.42, 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    edge_x, edge_y = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    length = math.hypot(edge_x, edge_y)
    return ((radius * torch.cos(angle) - outer) * edge_y - radius * torch.sin(angle) * edge_x) / length


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.6).abs() - 0.22


def _cross(x: Tensor, y: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    return torch.minimum(torch.maximum(ax - 0.27, ay - 0.85), torch.maximum(ax - 0.85, ay - 0.27))


_DISTANCE: Final[tuple[Callable[[Tensor, Tensor], Tensor], ...]] = (_circle, _square, _triangle, _star, _ring, _cross)


def _table(rows: list[tuple[float, ...]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def render(codes: Tensor, jitter: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
    """Draw a batch of scenes.

    Args:
        codes: int64 [B, CODE_DIM], from :func:`~turbolens_training.mini.scenes.encode_scenes`.
        jitter: float32 [B, 16] standard normals for what the caption leaves open; clamped to +-2.
        size: edge of the picture in pixels.

    Returns:
        The pictures, [B, 3, size, size] in [-1, 1], and the share of each pixel that things cover,
        [B, 1, size, size] in [0, 1] (a neon glow is light, not a thing).
    """
    jitter = jitter.clamp(-2, 2)
    grid = (torch.arange(size, device=jitter.device, dtype=jitter.dtype) + 0.5) / size * 2 - 1
    ys, xs = torch.meshgrid(grid, grid, indexing="ij")  # [size, size] each
    pixel = 2 / size

    ground = _table([_GROUND[b][0] + _GROUND[b][1] for b in BACKGROUNDS], jitter)[codes[:, BACKGROUND]]
    slant = ((ys + 1) / 2 + 0.08 * jitter[:, 8, None, None] * xs).clamp(0, 1)[:, None]  # [B, 1, size, size]
    picture = ground[:, :3, None, None] * (1 - slant) + ground[:, 3:, None, None] * slant
    picture = picture + 0.02 * jitter[:, 9, None, None, None]
    cover = torch.zeros_like(slant)

    light = _table([_LIGHT[b] for b in BACKGROUNDS], jitter)[codes[:, BACKGROUND]]
    centers = _table([sum(_CENTER[name], ()) for name in LAYOUTS], jitter)[codes[:, LAYOUT]]
    neon = (codes[:, STYLE] == STYLES.index("neon"))[:, None, None, None]
    pair = codes[:, COUNT] == 2
    for slot in range(2):
        own = jitter[:, 4 * slot : 4 * slot + 4]
        radius = _table([(_RADIUS[s],) for s in SIZES], jitter)[codes[:, thing_column(slot, "size")], 0]
        radius = torch.where(pair, radius * _PAIR_SCALE, radius)[:, None, None]
        center = centers[:, 2 * slot : 2 * slot + 2] + 0.04 * own[:, :2]
        turn = 0.06 * own[:, 2, None, None]
        dx, dy = (xs - center[:, 0, None, None]) / radius, (ys - center[:, 1, None, None]) / radius
        x, y = dx * torch.cos(turn) + dy * torch.sin(turn), dy * torch.cos(turn) - dx * torch.sin(turn)

        distance = torch.empty_like(x)
        shape_of = codes[:, thing_column(slot, "shape")]
        for index in range(len(SHAPES)):
            rows = (shape_of == index).nonzero()[:, 0]
            if len(rows):
                distance[rows] = _DISTANCE[index](x[rows], y[rows])
        distance = (distance * radius)[:, None]  # [B, 1, size, size], in picture units

        color = _table([_RGB[c] for c in COLORS], jitter)[codes[:, thing_column(slot, "color")]]
        color = ((color + 0.04 * own[:, 3:4]).clamp(0, 1) * light)[:, :, None, None]
        bright = color.sum(1, keepdim=True) > 0.8
        second = torch.where(bright, color * 0.42, color * 0.4 + 0.5)
        wave = torch.sin(_STRIPES * y) * radius / (_STRIPES * pixel)
        striped = (codes[:, thing_column(slot, "texture")] == TEXTURES.index("striped"))[:, None, None]
        stripes = ((wave + 0.5).clamp(0, 1) * striped)[:, None]
        fill = color * (1 - stripes) + second * stripes

        present = (codes[:, COUNT] > slot)[:, None, None, None]
        alpha = (0.5 - distance / pixel).clamp(0, 1) * present
        glow = torch.exp(-distance.clamp(min=0) / 0.12) * 0.8 * (1 - alpha) * (present & neon)
        picture = picture * (1 - glow) + (color * 0.55 + 0.45) * glow
        rim = torch.exp(-((distance / 0.045) ** 2)) * 0.7 * neon
        picture = picture * (1 - alpha) + (fill * (1 - rim) + rim) * alpha
        cover = torch.maximum(cover, alpha)
    return picture.clamp(0, 1) * 2 - 1, cover
