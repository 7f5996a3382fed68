"""AuxK by its two ways, dense and sparse, beside its slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.sae import auxk, twin
from turbolens_training.sae.auxk import auxk_loss, decode_dead, top_k_among
from turbolens_training.sae.maths import decode, pre_activations, top_k

D_MODEL, D_SAE, K_AUX = 12, 40, 6


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
        loss = auxk_loss(decode(top_k(x @ encoder, K_AUX), rows), residual)
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
    assert auxk_loss(decode(learning, rows), residual).item() == pytest.approx(expected, rel=1e-5)
    assert auxk_loss(decode(top_k(torch.full_like(pre, -1.0), 1), rows), residual).item() == pytest.approx(1.0)


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
    auxk_loss(decode(top_k_among(pre, K_AUX, torch.arange(len(rows)), barred), rows), residual).backward()
    assert pre.grad is not None
    assert torch.isfinite(pre.grad).all()
    assert (pre.grad[:, barred] == 0).all()
    assert (pre.grad[:, ~barred] != 0).any()


@given(seed=st.integers(0, 2**31), k=st.integers(1, 8), dead=st.integers(1, 12), barred=st.integers(0, 12))
def test_few_dead_features_learn_densely_what_many_learn_sparsely(seed: int, k: int, dead: int, barred: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, members = draw(30, D_MODEL), torch.randperm(D_SAE, generator=g)[:dead]
    off = torch.arange(dead) < barred
    drawn = draw(D_MODEL, D_SAE), draw(D_SAE), draw(D_SAE, D_MODEL), draw(D_MODEL)
    found = []
    for most in (12, 0):
        weights = SaeWeights(*(tensor.clone().requires_grad_() for tensor in drawn))
        pre = pre_activations(weights, x).detach()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auxk, "DENSE_DEAD", most)
            made = decode_dead(weights, x, pre, k, members, off)
        made.square().sum().backward()
        found.append([made, *(tensor.grad for tensor in weights.tensors().values())])
    for dense, sparse in zip(*found, strict=True):
        assert dense is not None
        assert sparse is not None
        assert torch.allclose(dense, sparse)
    weights = SaeWeights(*drawn)
    allowed = members[~off]
    expected = twin.top_k(twin.pre_activations(weights, x)[:, allowed], k) @ weights.W_dec[allowed]
    assert torch.allclose(found[0][0], expected)
