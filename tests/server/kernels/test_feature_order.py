"""Orders of features over the tiles of the encoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.kernels.permutation import spread_order, strided_order


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_orders_hold_every_feature_once_and_rise_in_every_tile(tiles, tile, seed):
    fires = (torch.rand(50, tiles * tile, generator=torch.Generator().manual_seed(seed)) < 0.2).float()
    for order in (strided_order(tiles * tile, tile), spread_order(fires.T @ fires, tile)):
        assert order.dtype == torch.int32
        assert order.sort().values.tolist() == list(range(tiles * tile))
        by_tile = order.view(tiles, tile)
        assert (by_tile[:, 1:] > by_tile[:, :-1]).all()


def test_features_that_fire_together_part():
    """Four cliques of four, each in a tile of its own at first: afterwards every tile has one of each clique."""
    together = torch.block_diag(*[torch.ones(4, 4)] * 4)
    order = spread_order(together, 4)
    assert [sorted(tile) for tile in (order.view(4, 4) // 4).tolist()] == [[0, 1, 2, 3]] * 4
    assert strided_order(16, 4).view(4, 4)[0].tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("tile", [0, 3, 32])
def test_a_tile_that_does_not_divide_is_refused(tile):
    with pytest.raises(ValueError, match=f"tile: a divisor of 16, not {tile}"):
        strided_order(16, tile)
