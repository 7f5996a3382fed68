"""The steering algebra against its slow twin, and its laws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.reference import encode_dense, steer_dense
from turbolens_server.sae.sae import Codes, Sae
from turbolens_server.sae.steering import ResolvedEdit, needs_codes, steer

POSITIONS, D_MODEL, D_SAE = 6, 16, 40


def make_bundle(seed: int, architecture: str = "topk") -> Bundle:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1)
    weights = SaeWeights(
        W_enc=W_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(D_SAE, generator=generator),
        W_dec=W_dec,
        b_dec=torch.randn(D_MODEL, generator=generator),
        threshold=torch.rand(D_SAE, generator=generator) if architecture == "jumprelu" else None,
    )
    k = 5 if architecture == "topk" else None
    return Bundle("x", "mid.0", architecture, k, weights, None, "", None, {})


amounts = st.floats(-20, 20, width=32)


@st.composite
def edit_lists(draw):
    """Up to six edits; replacing masks share the positions out, so that they do not overlap."""
    owner = draw(st.lists(st.integers(0, 2), min_size=POSITIONS, max_size=POSITIONS))
    edits = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["add", "scale", "set", "replace"]))
        features = draw(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=4, unique=True))
        mask = draw(st.lists(st.floats(0, 1, width=32), min_size=POSITIONS, max_size=POSITIONS))
        if kind == "replace":
            turn = sum(edit.kind == "replace" for edit in edits)
            mask = [m if owner[p] == turn else 0.0 for p, m in enumerate(mask)]
        values = draw(st.lists(amounts, min_size=len(features), max_size=len(features)))
        edits.append(ResolvedEdit(kind, torch.tensor(features), torch.tensor(values), torch.tensor(mask)))
    return edits


@given(edit_lists(), st.integers(0, 50), st.sampled_from(["topk", "jumprelu"]))
def test_steer_equals_the_slow_twin(edits, seed, architecture):
    bundle = make_bundle(seed, architecture)
    sae = Sae(bundle, torch.device("cpu"))
    x = 3 * torch.randn(POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    codes = sae.encode(x) if needs_codes(edits) else None
    expected = steer_dense(bundle, x, edits)
    scale = max(1.0, float(expected.abs().max()))
    assert torch.allclose(steer(x, edits, sae.W_dec, codes) / scale, expected / scale, atol=2e-5)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_encode_equals_the_slow_twin(architecture):
    bundle = make_bundle(3, architecture)
    x = torch.randn(200, D_MODEL)
    codes = Sae(bundle, torch.device("cpu")).encode(x)
    dense = torch.zeros(200, D_SAE).scatter_add(-1, codes.indices, codes.values)
    assert torch.allclose(dense, encode_dense(bundle, x), atol=1e-5)
    assert (codes.values[:, :-1] >= codes.values[:, 1:]).all()
    if architecture == "topk":
        assert ((dense > 0).sum(-1) <= bundle.k).all()
    assert (dense > 0).any()


def test_codes_of_some_features_are_columns_of_the_dense_ones():
    bundle = make_bundle(4)
    x = torch.randn(50, D_MODEL)
    codes = Sae(bundle, torch.device("cpu")).encode(x)
    some = torch.tensor([0, 7, 39])
    assert torch.allclose(codes.of(some), encode_dense(bundle, x)[:, some], atol=1e-5)


def everywhere(kind: str, features: list[int], values: list[float]) -> ResolvedEdit:
    return ResolvedEdit(kind, torch.tensor(features), torch.tensor(values), torch.ones(POSITIONS))


def test_no_edit_is_the_same_object_and_neutral_edits_change_nothing():
    bundle = make_bundle(5)
    sae = Sae(bundle, torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL)
    codes = sae.encode(x)
    active = codes.indices[0, :3].tolist()
    assert steer(x, [], sae.W_dec, None) is x
    assert torch.equal(steer(x, [everywhere("add", active, [0.0] * 3)], sae.W_dec, None), x)
    assert torch.equal(steer(x, [everywhere("scale", active, [1.0] * 3)], sae.W_dec, codes), x)
    nowhere = dataclasses.replace(everywhere("replace", active, [5.0] * 3), mask=torch.zeros(POSITIONS))
    assert torch.equal(steer(x, [nowhere], sae.W_dec, None), x)


@given(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32))
def test_add_is_linear_in_strength(a, b):
    sae = Sae(make_bundle(6), torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(0))

    def moved(strength):
        return steer(x, [everywhere("add", [3, 9], [strength, -strength])], sae.W_dec, None) - x

    assert torch.allclose(moved(a) + moved(b), moved(a + b), atol=1e-4)


def test_scale_zero_removes_exactly_the_feature():
    bundle = make_bundle(7)
    sae = Sae(bundle, torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL)
    codes = sae.encode(x)
    feature = codes.indices[0, 0]
    steered = steer(x, [everywhere("scale", [int(feature)], [0.0])], sae.W_dec, codes)
    expected = x - codes.of(feature[None]) * sae.W_dec[feature]
    assert torch.allclose(steered, expected, atol=1e-6)
    assert not torch.allclose(steered, x)


def test_half_precision_updates_keep_their_type():
    sae = Sae(make_bundle(8), torch.device("cpu"))
    x = torch.randn(POSITIONS, D_MODEL).half()
    steered = steer(x, [everywhere("add", [1], [2.0])], sae.W_dec, None)
    assert steered.dtype == torch.float16
    assert np.allclose((steered - x).float().numpy(), (2 * sae.W_dec[1]).numpy(), atol=1e-2)


def test_closed_loop_without_activations_is_refused():
    sae = Sae(make_bundle(9), torch.device("cpu"))
    with pytest.raises(ValueError, match="activations"):
        steer(torch.zeros(POSITIONS, D_MODEL), [everywhere("scale", [1], [0.0])], sae.W_dec, None)
    empty = Codes(torch.zeros(POSITIONS, 1), torch.zeros(POSITIONS, 1, dtype=torch.int64))
    assert not steer(torch.zeros(POSITIONS, D_MODEL), [everywhere("scale", [1], [0.0])], sae.W_dec, empty).any()
