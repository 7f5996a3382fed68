"""Features of a region, on runs whose activations are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import turbolens as tl
from turbolens._blocks import RunFeatures
from turbolens._regions import on_grid
from turbolens_proto.v1 import run_pb2

EDGE, D_SAE = 4, 6


def run_of(z: np.ndarray) -> RunFeatures:
    """Of activations [steps, EDGE, EDGE, D_SAE]."""
    chunks = []
    for step, grid in enumerate(z.reshape(len(z), -1, D_SAE)):
        position, index = grid.nonzero()
        chunks.append(
            run_pb2.SparseFeatures(
                sae="up.0.1", step=step, height=EDGE, width=EDGE, d_sae=D_SAE,
                counts=np.bincount(position, minlength=EDGE**2).astype("<u2").tobytes(),
                indices=index.astype("<u2").tobytes(), values=grid[position, index].astype("<f4").tobytes(),
                value_type=run_pb2.VALUE_TYPE_FLOAT32,
            )
        )  # fmt: skip
    return RunFeatures(7, chunks, lambda sae: {2: "star"})


def test_what_fires_in_the_region_alone_comes_first():
    z = np.zeros((2, EDGE, EDGE, D_SAE), np.float32)
    z[..., 0] = 9  # everywhere
    z[:, :2, :2, 2] = 1  # the region alone
    z[:, :2, :, 3] = 5  # the region and as much beside it
    z[:, 2:, 2:, 4] = 7  # elsewhere
    found = run_of(z).inside(tl.box(0, 0, 0.5, 0.5))
    assert [(row.ref.index, row.label) for row in found] == [(2, "star"), (3, ""), (0, "")]
    assert found[0].effect == 1.0
    assert (found[0].inside, found[0].outside) == (1.0, 0.0)
    assert 0 < found[1].effect < 1
    assert found[2].effect == 0
    assert len(run_of(z).inside(tl.box(0, 0, 0.5, 0.5), limit=1)) == 1
    assert tl.add(found[0], 4).features[0][0] == tl.feature("up.0.1", 2)


@given(seed=st.integers(0, 2**31))
def test_effects_are_the_share_of_pairs_of_positions_that_are_larger(seed):
    rng = np.random.default_rng(seed)
    z = (rng.exponential(size=(1, EDGE, EDGE, D_SAE)) * (rng.random((1, EDGE, EDGE, D_SAE)) < 0.5)).astype(np.float32)
    for row in run_of(z).inside(tl.box(0, 0, 1, 0.25)):
        inside, outside = z[0, :1, :, row.ref.index].ravel(), z[0, 1:, :, row.ref.index].ravel()
        signs = [np.sign(a - b) for a in inside for b in outside]
        assert row.effect == pytest.approx(np.mean(signs), abs=1e-6)


def test_masks_of_every_form_cover_the_same_cells():
    ramp = np.zeros((8, 8))
    ramp[:, :4] = 1
    expected = [[1, 1, 0, 0]] * 4
    for mask in (tl.box(0, 0, 0.5, 1), tl.mask(ramp), tl.polygon((0, 0), (0.5, 0), (0.5, 1), (0, 1))):
        assert np.allclose(on_grid(mask, 4, 4), expected, atol=0.07)
    assert np.allclose(on_grid(tl.box(0, 0, 0.25, 0.125), 2, 2), [[0.125, 0], [0, 0]])


@pytest.mark.parametrize("mask", [tl.box(0, 0, 1, 1), tl.box(0, 0, 0.05, 0.05)])
def test_a_region_that_leaves_nothing_to_compare_is_refused(mask):
    with pytest.raises(ValueError, match=r"the mask covers (nothing|everything) on the grid of up\.0\.1"):
        run_of(np.ones((1, EDGE, EDGE, D_SAE), np.float32)).inside(mask)
