"""Packed edits, applied to a whole batch at once, against the dense steering of one picture after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.kernels import ops, twin
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.twin import encode_dense, steer_dense
from turbolens_server.steering.compose import compose, pack
from turbolens_server.steering.resolve import ResolvedEdit

POSITIONS, D_MODEL, D_SAE, K = 5, 8, 24, 4


def make_bundle() -> Bundle:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1)
    weights = SaeWeights(W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.zeros(D_MODEL))
    return Bundle("x", "mid.0", "topk", K, weights, None, "", None, {})


BUNDLE = make_bundle()


@st.composite
def edit_lists(draw):
    """Up to four edits of one picture; the masks of `replace` share the positions out, so that they do not overlap."""
    owner = draw(st.lists(st.integers(0, 1), min_size=POSITIONS, max_size=POSITIONS))
    edits = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["add", "scale", "set", "replace"]))
        features = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
        mask = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=POSITIONS, max_size=POSITIONS))
        if kind == "replace":
            turn = sum(edit.kind == "replace" for edit in edits)
            mask = [m if owner[p] == turn else 0.0 for p, m in enumerate(mask)]
        amounts = draw(st.lists(st.floats(-9, 9, width=16), min_size=len(features), max_size=len(features)))
        edits.append(ResolvedEdit(kind, torch.tensor(features), torch.tensor(amounts), torch.tensor(mask)))
    return edits


def updates(rows):
    return 3 * torch.randn(rows, POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(rows))


def codes_of(x):
    values, indices, _ = ops.encode_topk(x.flatten(0, 1), BUNDLE.weights.W_enc, BUNDLE.weights.b_enc, K)
    return values.view(*x.shape[:2], K), indices.view(*x.shape[:2], K)


def no_codes(x):
    return x.new_zeros(*x.shape[:2], 0), torch.zeros(*x.shape[:2], 0, dtype=torch.int64)


def packed_edits(batch):
    return pack([compose(row, POSITIONS) if row else None for row in batch], POSITIONS)


def closed(batch):
    return any(edit.kind in ("scale", "set") for edits in batch for edit in edits)


def run(apply, x, packed, codes):
    fields = (packed.gain, packed.offsets, packed.features, packed.slope, packed.shift)
    return apply(x, *fields, BUNDLE.weights.W_dec, *codes)


@given(st.lists(edit_lists(), min_size=1, max_size=4))
def test_a_batch_in_one_go_is_each_picture_by_the_dense_twin(batch):
    x = updates(len(batch))
    packed = packed_edits(batch)
    codes = codes_of(x) if closed(batch) else no_codes(x)
    steered = run(ops.apply_edits, x, packed, codes)
    expected = torch.stack([steer_dense(BUNDLE, row, edits) for row, edits in zip(x, batch, strict=True)])
    assert torch.allclose(steered, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert torch.allclose(steered.double(), run(twin.apply_edits, x, packed, codes), atol=1e-4)


@given(st.lists(edit_lists(), min_size=1, max_size=4))
def test_a_feature_has_one_entry_a_row_and_activations_are_read_only_where_something_is_closed_loop(batch):
    packed = packed_edits(batch)
    for row, edits in enumerate(batch):
        own = packed.features[packed.offsets[row] : packed.offsets[row + 1]].tolist()
        assert own == sorted({j for edit in edits for j in edit.features.tolist()})
    assert closed(batch) == any(compose(edits, POSITIONS).closed for edits in batch)
    if not closed(batch):
        assert not packed.slope.any()


def edit(kind, features, amounts, mask=None):
    mask = torch.ones(POSITIONS) if mask is None else torch.tensor(mask)
    return ResolvedEdit(kind, torch.tensor(features), torch.tensor(amounts), mask)


def test_neutral_edits_and_rows_without_edits_change_no_bit():
    x = updates(4).half()
    neutral = [
        [edit("add", [1, 2], [0.0, 0.0])],
        [edit("scale", [1], [1.0]), edit("set", [2], [9.0], [0.0] * POSITIONS)],
        [],
        [edit("replace", [3], [5.0], [0.0] * POSITIONS)],
    ]
    steered = run(ops.apply_edits, x, packed_edits(neutral), codes_of(x.float()))
    assert steered.dtype == torch.float16
    assert torch.equal(steered, x)


def test_set_gives_exactly_that_activation_and_leaves_the_rest():
    x = updates(1)
    dense = encode_dense(BUNDLE, x[0])
    steered = run(ops.apply_edits, x, packed_edits([[edit("set", [3], [7.0])]]), codes_of(x))
    moved = (7.0 - dense[:, 3:4]) * BUNDLE.weights.W_dec[3]
    assert torch.allclose(steered[0], x[0] + moved, atol=1e-5)


def test_a_nan_in_one_row_stays_there():
    x = updates(2)
    x[0, 1] = float("nan")
    codes = codes_of(x)
    chosen = codes[1][0, 1, :2].tolist()  # among the activations that are NaN
    edits = [[edit("scale", chosen, [0.0, 0.0])], [edit("scale", [1, 2], [0.0, 0.0])]]
    both = run(ops.apply_edits, x, packed_edits(edits), codes)
    alone = run(ops.apply_edits, x[1:], packed_edits(edits[1:]), codes_of(x[1:]))
    assert codes[0][0, 1].isnan().all()
    assert both[0, 1].isnan().all()
    assert torch.allclose(both[1:], alone, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name():
    x = updates(2)
    packed = packed_edits([[edit("add", [1], [1.0])]])
    with pytest.raises(ValueError, match=r"gain: \[2, 5\], not \[1, 5\]"):
        run(ops.apply_edits, x, packed, no_codes(x))


def test_masks_that_round_to_more_than_the_whole_of_a_place_leave_nothing_of_the_update():
    """Twice the grey level 128 is a little more than 1, and is let through: the update must not turn round."""
    half = torch.full((POSITIONS,), 128 / 255)
    edits = [ResolvedEdit("replace", torch.tensor([j]), torch.tensor([2.0]), half) for j in (3, 7)]
    x = 1000 * updates(1)
    expected = (2 * 128 / 255 * BUNDLE.weights.W_dec[[3, 7]].sum(0)).expand(POSITIONS, -1)
    packed = run(ops.apply_edits, x, packed_edits([edits]), no_codes(x))
    for steered in (packed[0], steer_dense(BUNDLE, x[0], edits)):
        assert torch.allclose(steered, expected, atol=1e-4)
