"""Learned region gates, held to the slow twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from turbolens_server.gating import twin
from turbolens_server.gating.gates import Gates, GatesNotApplied
from turbolens_server.gating.maths import (
    GateHead,
    GateMlp,
    gate_bias,
    gate_probabilities,
    open_gates,
    straight_through,
)
from turbolens_server.unet.fused import _attention

CLOSED = -1e4
rows = hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(0, 1, width=32))


def a_head(d: int = 6, text: int = 4, hidden: int = 3, seed: int = 0) -> GateHead:
    rng = torch.Generator().manual_seed(seed)

    def mlp(width: int) -> GateMlp:
        shapes = ((width,), (width,), (hidden, width), (hidden,), (hidden, hidden), (hidden,))
        return GateMlp(*(torch.randn(shape, generator=rng) for shape in shapes))

    return GateHead(mlp(d), mlp(text), torch.randn((), generator=rng))


@given(st.integers(0, 2**16))
def test_probabilities_are_the_twins(seed):
    head, rng = a_head(seed=seed), np.random.default_rng(seed)
    positions, tokens = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 5, 4))
    found = gate_probabilities(
        head.features(torch.from_numpy(positions).float()), head.tokens(torch.from_numpy(tokens).float()), head.bias
    )
    weights = [{name: t.double().numpy() for name, t in part._asdict().items()} for part in head[:2]]
    for row, p, t in np.ndindex(2, 3, 5):
        f, e = twin.network(positions[row, p], weights[0]), twin.network(tokens[row, t], weights[1])
        assert found[row, p, t].item() == pytest.approx(twin.probability(f, e, head.bias.item()), abs=1e-5)


@given(rows, hnp.arrays(bool, (2, 3, 5)), st.floats(0, 1, width=32))
def test_what_is_open_is_the_twins(likely, heard, threshold):
    heard[..., 2] |= ~heard.any(-1)  # the prompt is heard everywhere
    found = open_gates(torch.from_numpy(likely), threshold, torch.from_numpy(heard)).numpy()
    everywhere = open_gates(torch.from_numpy(likely), threshold).numpy()
    for row, p in np.ndindex(2, 3):
        assert found[row, p].tolist() == twin.opened(likely[row, p].tolist(), threshold, heard[row, p].tolist())
        assert everywhere[row, p].tolist() == twin.opened(likely[row, p].tolist(), threshold, [True] * 5)


@given(rows, st.integers(0, 2**16))
def test_attention_under_gates_is_the_twins(likely, seed):
    rng, heads = torch.Generator().manual_seed(seed), 2
    opened = open_gates(torch.from_numpy(likely), 0.5)
    bias = gate_bias(opened.float(), CLOSED)
    q, k, v = (torch.randn(2, n, 4, generator=rng) for n in (3, 5, 5))
    found = _attention(q, k, v, heads, bias).numpy()
    for row in range(2):
        for head in range(heads):
            own = slice(2 * head, 2 * head + 2)
            parts = (part[row, :, own].double().numpy() for part in (q, k, v))
            expected = twin.attention(*parts, bias[row].double().numpy())
            assert np.abs(found[row][:, own] - expected).max() < 1e-5


@given(rows)
def test_closed_tokens_are_not_heard_at_all(likely):
    opened = open_gates(torch.from_numpy(likely), 0.5)
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    shares = _attention(q, k, torch.eye(5, 4).expand(2, 5, 4), 1, gate_bias(opened.float(), CLOSED))
    expected = opened.float() / opened.sum(-1, keepdim=True)
    assert torch.allclose(shares, expected[..., :4], atol=1e-6)
    assert (shares[~opened[..., :4]] == 0).all()


@given(rows)
def test_straight_through_is_hard_forward_and_soft_backward(likely):
    given_ = torch.from_numpy(likely).requires_grad_()
    opened = open_gates(given_, 0.5)
    gates = straight_through(given_, opened)
    assert torch.equal(gates, opened.float())  # to the bit: a rounding times -10,000 would be heard
    weights = torch.randn(gates.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((gates * weights).sum(), given_)
    assert torch.equal(gradient, weights)


def test_gates_count_where_they_were_asked():
    gates = Gates({"one": a_head()}, {"mid.0.attn2.0": "one", "up.0.1.attn2.0": "one"}, 0.5, CLOSED)
    gating = gates.of(torch.zeros(1, 5, 4))
    assert "mid.0.attn2.0" in gating
    assert "mid.0.attn1.0" not in gating
    gating.bias("mid.0.attn2.0", torch.zeros(1, 3, 6), None)
    with pytest.raises(GatesNotApplied, match=r"of 1 passes .* \{'up.0.1.attn2.0': 0\}"):
        gating.check(1)
    gating.bias("up.0.1.attn2.0", torch.zeros(1, 3, 6), None)
    gating.check(1)
    with pytest.raises(GatesNotApplied):
        gating.check(2)


def test_a_token_that_may_not_be_heard_stays_so_where_all_others_are_closed():
    gates = Gates({"one": a_head()}, {"a": "one"}, 1.0, CLOSED)  # all closed but the likeliest
    text, features = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1)), torch.randn(1, 3, 6)
    alone = gates.of(text).bias("a", features, None)
    best = alone.argmax(-1)
    added = torch.zeros(1, 3, 5).scatter_(-1, best[..., None], -torch.inf)
    found = gates.of(text).bias("a", features, added)
    assert (found.gather(-1, best[..., None]) == -torch.inf).all()
    assert ((found == 0).sum(-1) == 1).all()
