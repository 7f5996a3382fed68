from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.sae.sae import Sae
from turbolens_training.sae import twin
from turbolens_training.sae.maths import auxk_loss, decode, initial_weights, pre_activations, top_k, top_k_among
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.optimizer import UnitRowAdam

D_MODEL, D_SAE, K, K_AUX = 12, 40, 4, 6


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


def dead_features(seed: int = 0, dead: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual, encoder and decoder rows of dead features, and x."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, D_MODEL, generator=g)
    residual = x @ torch.randn(D_MODEL, D_MODEL, generator=g) * 0.3
    rows = functional.normalize(torch.randn(dead, D_MODEL, generator=g), dim=1)
    return residual, rows.T.clone(), rows, x


def test_auxk_makes_dead_features_reconstruct_the_residual() -> None:
    """With the sign turned, they would learn the residual's opposite, and adding them would make it larger."""
    residual, encoder, rows, x = dead_features()
    encoder, rows = encoder.requires_grad_(), rows.requires_grad_()
    optimizer = torch.optim.Adam([encoder, rows], lr=0.01)
    for _ in range(200):
        loss = auxk_loss(top_k(x @ encoder, K_AUX), residual, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    left = residual - _dead_part(x @ encoder, rows)
    assert left.square().sum() < 0.9 * residual.square().sum()


def _dead_part(pre: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return decode(top_k(pre, min(K_AUX, pre.shape[1])), rows)


@pytest.mark.parametrize("dead", [1, 3, K_AUX, 9, 30])
def test_auxk_is_the_share_of_the_residual_that_the_dead_leave_without_a_bias(dead: int) -> None:
    residual, encoder, rows, x = dead_features(dead=dead)
    pre = x @ encoder
    learning = top_k_among(pre, K_AUX, torch.arange(dead), torch.zeros(dead, dtype=torch.bool))
    expected = twin.auxk_loss(pre, residual, rows, K_AUX)
    assert auxk_loss(learning, residual, rows).item() == pytest.approx(expected, rel=1e-5)
    assert auxk_loss(top_k(torch.full_like(pre, -1.0), 1), residual, rows).item() == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 4, 6])
def test_only_members_that_are_not_barred_are_chosen(k: int) -> None:
    pre = torch.randn(50, D_SAE, generator=torch.Generator().manual_seed(0))
    members, barred = torch.tensor([3, 7, 11, 12, 30]), torch.tensor([False, True, False, True, False])
    allowed = members[~barred]
    expected = torch.zeros(50, D_SAE)
    expected[:, allowed] = twin.top_k(pre[:, allowed], k)
    assert torch.equal(twin.dense(top_k_among(pre, k, members, barred), D_SAE), expected)


def test_auxk_does_not_reach_what_is_barred() -> None:
    residual, encoder, rows, x = dead_features()
    pre = (x @ encoder).requires_grad_()
    barred = torch.arange(pre.shape[1]) < 3
    auxk_loss(top_k_among(pre, K_AUX, torch.arange(len(rows)), barred), residual, rows).backward()
    assert pre.grad is not None
    assert torch.isfinite(pre.grad).all()
    assert (pre.grad[:, barred] == 0).all()
    assert (pre.grad[:, ~barred] != 0).any()


@given(seed=st.integers(0, 2**31), k=st.integers(1, 6), dense_too=st.booleans())
def test_gradients_are_those_of_dense_maths(seed: int, k: int, dense_too: bool) -> None:
    """Whether pre-activations get a sparse gradient alone, or a dense one on top."""
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for sparse in (True, False):
        weights = as_double(random_weights(seed))
        parameters = [tensor.requires_grad_() for tensor in weights.tensors().values()]
        if sparse:
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
    assert all(torch.allclose(ours, expected) for ours, expected in zip(*found, strict=True))


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
