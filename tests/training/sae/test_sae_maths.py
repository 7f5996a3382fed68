from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_training.sae import twin
from turbolens_training.sae.maths import (
    ByFeature,
    decode,
    initial_weights,
    pre_activations,
    top_k,
    top_k_loss,
)
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.optimizer import UnitRowAdam

D_MODEL, D_SAE, K = 12, 40, 4


def random_weights(seed: int) -> SaeWeights:
    g = torch.Generator().manual_seed(seed)
    rows = functional.normalize(torch.randn(D_SAE, D_MODEL, generator=g), dim=1)
    encoder = torch.randn(D_MODEL, D_SAE, generator=g)
    return SaeWeights(encoder, torch.randn(D_SAE, generator=g), rows, torch.randn(D_MODEL, generator=g))


def as_double(weights: SaeWeights) -> SaeWeights:
    return SaeWeights(**{name: tensor.double() for name, tensor in weights.tensors().items()})


def reconstruct(weights: SaeWeights, x: torch.Tensor) -> torch.Tensor:
    return decode(top_k(pre_activations(weights, x), K), weights.W_dec) + weights.b_dec


@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100), offset=st.floats(-50, 50))
def test_folding_the_normaliser_changes_nothing(seed: int, scale: float, offset: float) -> None:
    g = torch.Generator().manual_seed(seed)
    weights = random_weights(seed)
    normalizer = Normalizer(torch.randn(D_MODEL, generator=g) + offset, scale)
    x = torch.randn(30, D_MODEL, generator=g).double() * scale + normalizer.mean
    folded = normalizer.fold(weights)

    unfolded_out = reconstruct(as_double(weights), (x - normalizer.mean.double()) / scale) * scale + normalizer.mean
    folded_out = reconstruct(as_double(folded), x)
    unfolded_pre = pre_activations(as_double(weights), (x - normalizer.mean.double()) / scale) * scale
    # The folded biases are stored in float32: that is all that may differ, unless a tie at rank k turns.
    size = unfolded_pre.abs().max() + weights.W_enc.abs().sum(0).max() * folded.b_dec.abs().max()
    assert (pre_activations(as_double(folded), x) - unfolded_pre).abs().max() < 1e-6 * size
    same = (folded_out - unfolded_out).abs().amax(1) < 1e-5 * size
    assert same.float().mean() > 0.9
    assert torch.equal(folded.W_enc, weights.W_enc)
    assert torch.equal(folded.W_dec, weights.W_dec)


def test_the_normaliser_centres_and_makes_the_variance_one_per_dimension() -> None:
    x = torch.randn(5000, D_MODEL) * torch.arange(1, D_MODEL + 1) + 7
    normal = Normalizer.fit(x)(x)
    assert normal.mean(0).abs().max() < 1e-4
    assert normal.square().mean().item() == pytest.approx(1, abs=1e-4)


@given(seed=st.integers(0, 2**31), k=st.integers(1, 6), dense_too=st.booleans())
def test_gradients_are_those_of_dense_maths(seed: int, k: int, dense_too: bool) -> None:
    """Encoded in one piece, or with a sparse gradient of pre-activations alone, or with a dense one on top."""
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for way in ("sparse", "dense", *([] if dense_too else ["in one piece"])):
        weights = as_double(random_weights(seed))
        parameters = [tensor.requires_grad_() for tensor in weights.tensors().values()]
        if way == "in one piece":
            loss, pre, active, error = top_k_loss(weights, x, k)
            z = twin.top_k(twin.pre_activations(weights, x), k)
            assert torch.allclose(twin.dense(active, D_SAE), z)
            assert torch.allclose(error, z @ weights.W_dec + weights.b_dec - x)
            assert loss.item() == pytest.approx(twin.fvu(x, error + x))
            found.append(torch.autograd.grad(loss, parameters))
            continue
        if way == "sparse":
            pre = pre_activations(weights, x)
            reconstruction = decode(top_k(pre, k), weights.W_dec) + weights.b_dec
        else:
            pre = (x - weights.b_dec) @ weights.W_enc + weights.b_enc
            mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k, dim=1).indices, True)
            reconstruction = (pre * mask).relu() @ weights.W_dec + weights.b_dec
        loss = (reconstruction - x).square().mean()
        if dense_too:
            loss = loss + pre.square().mean()
        found.append(torch.autograd.grad(loss, parameters))
    for others in found[1:]:
        assert all(torch.allclose(ours, expected) for ours, expected in zip(found[0], others, strict=True))


@given(seed=st.integers(0, 2**31), d_sae=st.sampled_from([3, 300, 1 << 16, (1 << 16) + 1]), entries=st.integers(0, 200))
def test_entries_by_feature_stay_in_order_where_they_are_equal(seed: int, d_sae: int, entries: int) -> None:
    g = torch.Generator().manual_seed(seed)
    features = torch.randint(max(0, d_sae - 9), d_sae, (entries,), generator=g)
    positions = torch.arange(entries) * 7
    found = ByFeature.of(features, positions, d_sae)
    expected = sorted(range(entries), key=lambda entry: int(features[entry]))
    assert found.order.tolist() == expected
    assert torch.equal(found.positions, positions[found.order])
    assert found.offsets[features].tolist() == [int((features < feature).sum()) for feature in features]


def test_the_gradient_for_pre_activations_is_never_written_out() -> None:
    weights = random_weights(0)
    for tensor in weights.tensors().values():
        tensor.requires_grad_()
    kinds: list[torch.layout] = []
    pre = pre_activations(weights, torch.randn(30, D_MODEL))
    pre.register_hook(lambda gradient: kinds.append(gradient.layout))
    decode(top_k(pre, K), weights.W_dec).sum().backward()
    assert kinds == [torch.sparse_coo]


def test_rows_are_unit_after_every_step() -> None:
    rows = functional.normalize(torch.randn(D_SAE, D_MODEL), dim=1).requires_grad_()
    other = torch.randn(D_SAE, requires_grad=True)
    optimizer = UnitRowAdam([other, rows], rows, lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        ((rows @ torch.randn(D_MODEL)).square() * other).sum().backward()
        optimizer.step()
        assert (rows.norm(dim=1) - 1).abs().max() < 1e-6


def test_the_gradient_along_a_row_is_removed() -> None:
    rows = functional.normalize(torch.randn(3, D_MODEL), dim=1).requires_grad_()
    optimizer = UnitRowAdam([rows], rows, lr=0.1)
    rows.square().sum().backward()  # only pulls the norm
    optimizer.step()
    assert rows.grad is not None
    assert rows.grad.abs().max() < 1e-6


def test_the_encoder_starts_as_the_decoders_transpose_and_points_at_data() -> None:
    tokens = torch.randn(500, D_MODEL)
    weights = initial_weights(tokens, D_SAE, torch.Generator().manual_seed(0))
    assert torch.equal(weights.W_enc, weights.W_dec.T)
    assert (weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    nearest = (weights.W_dec @ functional.normalize(tokens, dim=1).T).amax(1)
    assert nearest.mean() > 0.75


def test_the_server_encodes_as_the_trainer_does() -> None:
    weights = random_weights(3)
    sae = Sae(Bundle("b", "b", "topk", K, weights, None, "", None, {}), torch.device("cpu"))
    x = torch.randn(100, D_MODEL)
    served = sae.encode(x)
    active = top_k(pre_activations(weights, x), K)
    trained = torch.zeros(100, D_SAE).scatter(1, active.features.view(100, K), active.values.view(100, K))
    dense = torch.zeros(100, D_SAE).scatter(1, served.indices, served.values)
    assert (trained - dense).abs().max() < 1e-5
    assert ((served.values > 0).sum(1) <= K).all()
