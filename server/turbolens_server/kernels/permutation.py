"""Orders of features that spread those which fire together over different tiles of the encoder.

The fused TopK encode takes a few candidates of each tile; a row whose features crowd into one tile has to be done
again. An order is the feature of each column, [d_sae] int32; in every tile the features rise, which is what makes the
kernel's choice among equal values right. Permute with it as `W_enc[:, order]` and `bias[order]`. The server does not:
tests and benchmarks measure what an order would bring.
"""

from __future__ import annotations

import torch
from torch import Tensor


def strided_order(d_sae: int, tile: int) -> Tensor:
    """Neighbours in different tiles: for dictionaries whose first features fire most, such as Matryoshka ones.

    Raises:
        ValueError: tile does not divide d_sae.
    """
    tiles = _count_tiles(d_sae, tile)
    return torch.arange(d_sae, dtype=torch.int32).view(tile, tiles).T.flatten()


def spread_order(together: Tensor, tile: int) -> Tensor:
    """Greedy: busiest features first, each into the tile with room where it fires least with those already there.

    Args:
        together: how often two features fire at one position, [d_sae, d_sae], symmetric.
        tile: features of a tile.

    Raises:
        ValueError: tile does not divide d_sae.
    """
    together = together.double().cpu()
    d_sae = len(together)
    tiles = _count_tiles(d_sae, tile)
    room = torch.full((tiles,), tile)
    crowd = torch.zeros(tiles, d_sae, dtype=torch.float64)  # how often each tile fires with each feature
    home = torch.empty(d_sae, dtype=torch.int64)
    for feature in together.sum(1).argsort(descending=True, stable=True).tolist():
        best = int(torch.where(room > 0, crowd[:, feature], torch.inf).argmin())
        home[feature] = best
        room[best] -= 1
        crowd[best] += together[feature]
    return home.argsort(stable=True).int()


def _count_tiles(d_sae: int, tile: int) -> int:
    if tile < 1 or d_sae % tile:
        raise ValueError(f"tile: a divisor of {d_sae}, not {tile}")
    return d_sae // tile
