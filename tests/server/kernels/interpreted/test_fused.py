"""The fused kernels, interpreted, against the slow twins; on whole numbers bit for bit, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolens_server.kernels import fused, plain, twin
from turbolens_server.kernels.fused import Tiles, candidates_for

SMALL = Tiles(block_m=16, block_n=16, block_k=16, merge_rows=16)
few_examples = settings(max_examples=10)  # an interpreted launch takes tens of milliseconds


def whole(generator, *shape):
    return torch.randint(-2, 3, shape, generator=generator).float()


@st.composite
def encoders(draw):
    """Updates, weights and bias of small whole numbers; no size need be a multiple of a tile."""
    rows, d_model, d_sae = draw(st.integers(0, 20)), draw(st.integers(1, 24)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bias = whole(generator, d_sae) - draw(st.sampled_from([0, 3, 100]))
    return whole(generator, rows, d_model), whole(generator, d_model, d_sae), bias


def check_topk(result, x, W_enc, bias, k):
    values, indices, _ = result
    expected, chosen = twin.select_topk(twin.pre_activations(x, W_enc, bias), k)
    positive = expected > 0
    assert torch.equal(values, expected.float())
    assert torch.equal(indices[positive], chosen[positive])
    assert all(len(set(row)) == k for row in indices.tolist())
    assert ((indices >= 0) & (indices < len(bias))).all()


@few_examples
@given(encoders(), st.data())
def test_topk_is_its_twin_however_few_candidates_a_tile_gives(encoder, data):
    x, W_enc, bias = encoder
    k = data.draw(st.integers(1, min(7, len(bias))))
    fewest = candidates_for(len(bias), k, SMALL.block_n)
    candidates = data.draw(st.sampled_from([None, k, min(k, fewest)]))
    tiles = Tiles(16, 16, 16, merge_rows=16, candidates=candidates)
    check_topk(fused.encode_topk(x, W_enc, bias, k, tiles=tiles), x, W_enc, bias, k)


def crowded():
    """Rows whose three best features share a tile of 16, and one whose best three stand in three tiles."""
    x = torch.eye(3, 16)
    W_enc = torch.zeros(16, 48)
    W_enc[0, [1, 2, 3]] = torch.tensor([5.0, 4.0, 3.0])
    W_enc[1, [4, 20, 36]] = torch.tensor([5.0, 4.0, 3.0])
    W_enc[2, [20, 21, 22, 40]] = torch.tensor([5.0, 5.0, 5.0, 5.0])
    return x, W_enc, torch.zeros(48)


def test_crowded_rows_are_flagged_done_again_and_right():
    x, W_enc, bias = crowded()
    result = fused.encode_topk(x, W_enc, bias, 3, tiles=Tiles(16, 16, 16, candidates=2, merge_rows=2))
    check_topk(result, x, W_enc, bias, 3)
    assert result[2].tolist() == [1, 0, 1]
    sure = fused.encode_topk(x, W_enc, bias, 3, tiles=Tiles(16, 16, 16, candidates=3))
    check_topk(sure, x, W_enc, bias, 3)
    assert sure[2].tolist() == [0, 0, 0]


def test_weights_may_stand_by_feature():
    x, W_enc, bias = crowded()
    check_topk(fused.encode_topk(x, W_enc.T.contiguous().T, bias, 3, tiles=SMALL), x, W_enc, bias, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_and_inf_come_first_and_stay_in_their_rows(dtype):
    generator = torch.Generator().manual_seed(0)
    x, W_enc, bias = whole(generator, 20, 5), whole(generator, 5, 40), whole(generator, 40)
    x[3, 0] = math.nan
    x[4, 1] = math.inf
    W_enc[1] = 1  # inf everywhere, but NaN in what pads the last tile
    bias[[9, 30]] = math.nan
    values, indices, _ = fused.encode_topk(x.to(dtype), W_enc.to(dtype), bias, 4, tiles=SMALL)
    expected, chosen = twin.select_topk(twin.pre_activations(x, W_enc, bias), 4)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.float().nan_to_num())
    assert torch.equal(indices[~(expected <= 0)], chosen[~(expected <= 0)])
    counts = fused.encode_jumprelu(x, W_enc, bias, torch.full((40,), 90.0), 8, tiles=SMALL)[2]
    assert counts[3] == 40
    assert (counts >= 2).all()


def test_candidates_are_few_and_enough():
    assert candidates_for(5120, 10, 128) == 5
    assert candidates_for(5120, 20, 128) == 6
    assert candidates_for(17, 17, 16) == 16  # the last tile has one feature, the first must give all of its own
    for d_sae, k in ((40, 7), (17, 5), (16, 16), (1, 1)):
        candidates = candidates_for(d_sae, k, 16)
        assert sum(min(candidates, len(tile)) for tile in torch.arange(d_sae).split(16)) >= k


@few_examples
@given(encoders(), st.sampled_from([1, 5, 40]), st.integers(0, 99))
def test_jumprelu_is_its_twin_and_counts_what_did_not_fit(encoder, slots, seed):
    x, W_enc, bias = encoder
    slots = min(slots, len(bias))
    threshold = whole(torch.Generator().manual_seed(seed), len(bias))
    values, indices, counts = fused.encode_jumprelu(x, W_enc, bias, threshold, slots, tiles=SMALL)
    expected = twin.select_above(twin.pre_activations(x, W_enc, bias), threshold)
    assert counts.tolist() == [len(row) for row in expected]
    for got, at, row in zip(values.tolist(), indices.tolist(), expected, strict=True):
        pairs = list(zip(got, at, strict=True))
        kept = min(len(row), slots)
        assert set(pairs[:kept]) <= set(row)
        assert len(set(at[:kept])) == kept
        if len(row) <= slots:
            assert pairs == row + [(0.0, 0)] * (slots - kept)


@few_examples
@given(st.integers(0, 5), st.integers(0, 4), st.integers(1, 300), st.integers(0, 99))
def test_gather_decode_is_its_twin_whatever_repeats(rows, width, d_model, seed):
    generator = torch.Generator().manual_seed(seed)
    values, indices = whole(generator, rows, width), torch.randint(0, 3, (rows, width), generator=generator)
    W_dec = whole(generator, 3, d_model)
    decoded = fused.gather_decode(values, indices, W_dec.half())
    assert torch.equal(decoded.double(), twin.gather_decode(values, indices, W_dec))


@few_examples
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 40), st.sampled_from([0, 1, 5]), st.data())
def test_edits_are_their_twin_for_rows_with_any_number_of_entries(entries, positions, k, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    d_model, d_sae, rows, total = 20, 7, len(entries), sum(entries)
    arguments = (
        whole(generator, rows, positions, d_model),
        whole(generator, rows, positions),
        torch.tensor([0, *entries]).cumsum(0).int(),
        torch.randint(0, d_sae, (total,), generator=generator),
        whole(generator, total, positions),
        whole(generator, total, positions),
        whole(generator, d_sae, d_model),
        whole(generator, rows, positions, k),
        torch.randint(0, d_sae, (rows, positions, k), generator=generator),
    )
    assert torch.equal(fused.apply_edits(*arguments).double(), twin.apply_edits(*arguments))


def test_half_precision_updates_keep_their_type_and_untouched_rows_their_bits():
    x = torch.randn(2, 5, 24).half()
    row = torch.tensor([0, 0, 1], dtype=torch.int32)
    edits = (torch.tensor([3]), torch.zeros(1, 5), torch.ones(1, 5), torch.ones(7, 24).half())
    codes = (torch.zeros(2, 5, 0), torch.zeros(2, 5, 0, dtype=torch.int64))
    steered = fused.apply_edits(x, torch.ones(2, 5), row, *edits, *codes)
    assert steered.dtype == torch.float16
    assert torch.equal(steered[0], x[0])
    assert torch.equal(steered[1], (x[1].float() + 1).half())


def test_topk_at_the_size_of_sdxl_turbo():
    """One picture, 5,120 features; large tiles, since in the interpreter only their number counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1280, generator=generator).half()
    W_enc = (torch.randn(1280, 5120, generator=generator) / 1280**0.5).half()
    bias = 0.1 * torch.randn(5120, generator=generator)
    tiles = Tiles(block_m=256, block_n=512, block_k=256, merge_rows=256)
    values, indices, flagged = fused.encode_topk(x, W_enc, bias, 20, tiles=tiles)
    expected, chosen, _ = plain.encode_topk(x, W_enc, bias, 20)
    assert torch.allclose(values, expected, atol=1e-4)
    swapped = indices != chosen  # only where two are as good as tied
    assert swapped.float().mean() <= 0.001
    assert torch.equal(indices.sort().values[~swapped.any(1)], chosen.sort().values[~swapped.any(1)])
    assert flagged.float().mean() <= 0.05
