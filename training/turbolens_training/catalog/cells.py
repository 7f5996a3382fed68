"""Which cell of a hook point's grid shows what: the ground truth behind labels."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import COUNT, LAYOUT, LAYOUTS

BACKGROUND: Final = -1
"""Things cover less than 5 % of the cell."""
EDGE: Final = -2
"""Between the two: neither thing nor background."""
_PIXELS: Final = 8


def cell_owners(codes: Tensor, jitter: Tensor, grid: tuple[int, int]) -> Tensor:
    """What each cell shows: 0 or 1, the slot of the thing that covers more than half of it, or one of the constants.

    Args:
        codes: [N, CODE_DIM].
        jitter: [N, 16].
        grid: rows and columns, the same number.

    Returns:
        [N, rows * columns] int64 in row order.
    """
    rows, columns = grid
    _, cover = render(codes, jitter, _PIXELS * rows)
    cover = functional.avg_pool2d(cover, _PIXELS)[:, 0]  # [N, rows, columns]
    # Two things lie on either side of the picture's middle line; what jitter moves across it fills no half cell.
    across = torch.arange(columns).expand(rows, columns) >= columns // 2
    down = (torch.arange(rows) >= rows // 2)[:, None].expand(rows, columns)
    above = (codes[:, LAYOUT] == LAYOUTS.index("above"))[:, None, None]
    second = torch.where(above, down, across) & (codes[:, COUNT] == 2)[:, None, None]
    owners = torch.where(cover > 0.5, second.long(), EDGE)
    return torch.where(cover < 0.05, BACKGROUND, owners).flatten(1)
