"""The operators on a CPU against their slow twins, with everything that makes a selection hard."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from turbolens_server.kernels import choice, ops, plain, twin


@st.composite
def encoders(draw):
    """Updates, weights and bias of small whole numbers: sums are exact in any order, and ties abound."""
    rows, d_model, d_sae = draw(st.integers(0, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    return whole(rows, d_model), whole(d_model, d_sae), whole(d_sae) - draw(st.sampled_from([0, 0, 5, 100]))


@given(encoders(), st.data())
def test_topk_is_the_rule_of_its_twin_and_ties_go_to_the_smaller_feature(encoder, data):
    x, W_enc, bias = encoder
    k = data.draw(st.integers(1, len(bias)))
    values, indices, flagged = ops.encode_topk(x, W_enc, bias, k)
    expected, chosen = twin.select_topk(twin.pre_activations(x, W_enc, bias), k)
    assert torch.equal(values, expected.float())
    positive = expected > 0
    assert torch.equal(indices[positive], chosen[positive])
    assert all(len(set(row)) == k for row in indices.tolist())
    assert indices.dtype == torch.int64
    assert flagged.tolist() == [0] * len(x)


def test_a_nan_is_seen_and_stays_in_its_row():
    torch.manual_seed(0)
    x, W_enc, bias = torch.randn(4, 3), torch.randn(3, 12), torch.randn(12)
    x[1, 2] = math.nan
    x[2, 0] = math.inf
    values, indices, _ = ops.encode_topk(x, W_enc, bias, 5)
    clean = ops.encode_topk(x[[0, 3]], W_enc, bias, 5)
    assert values[1].isnan().all()
    assert values[2, 0] == math.inf
    assert torch.allclose(values[[0, 3]], clean.values)
    assert torch.equal(indices[[0, 3]], clean.indices)
    bias[7] = math.nan
    values, indices, _ = ops.encode_topk(x[:1], W_enc, bias, 5)
    assert values[0].isnan().tolist() == [True, False, False, False, False]
    assert indices[0, 0] == 7
    above = ops.encode_jumprelu(x[:1], W_enc, bias, torch.full((12,), 100.0), 3)
    assert above.counts.tolist() == [1]
    assert above.values[0, 0].isnan()


@given(encoders(), st.data())
def test_jumprelu_is_its_twin_and_tells_what_did_not_fit(encoder, data):
    x, W_enc, bias = encoder
    threshold = torch.randint(-3, 4, (len(bias),), generator=torch.Generator().manual_seed(1)).float()
    slots = data.draw(st.integers(1, len(bias)))
    values, indices, counts = ops.encode_jumprelu(x, W_enc, bias, threshold, slots)
    expected = twin.select_above(twin.pre_activations(x, W_enc, bias), threshold)
    assert counts.tolist() == [len(row) for row in expected]
    for got, at, row in zip(values.tolist(), indices.tolist(), expected, strict=True):
        kept = min(len(row), slots)
        assert got == [value for value, _ in row[:slots]] + [0.0] * (slots - kept)
        if len(row) <= slots:
            assert sorted(zip(got[:kept], at[:kept], strict=True)) == sorted(row)


@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 99))
def test_gather_decode_is_its_twin_whatever_repeats(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, width, generator=generator)
    indices = torch.randint(0, 3, (rows, width), generator=generator)
    W_dec = torch.randn(3, 7, generator=generator)
    expected = twin.gather_decode(values, indices, W_dec)
    assert torch.allclose(ops.gather_decode(values, indices, W_dec).double(), expected, atol=1e-5)


def test_halves_are_encoded_in_float32():
    x, W_enc, bias = torch.randn(8, 40).half(), torch.randn(40, 30).half(), torch.randn(30)
    values, indices, _ = ops.encode_topk(x, W_enc, bias, 4)
    expected, chosen = twin.select_topk(twin.pre_activations(x, W_enc, bias), 4)
    assert values.dtype == torch.float32
    assert torch.allclose(values.double(), expected, atol=1e-4)
    assert torch.equal(indices, chosen)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_gradients_of_encode_are_those_of_finite_differences():
    torch.manual_seed(0)
    inputs = (double(6, 4), double(4, 11), (double(11) - 3).detach().requires_grad_())

    def values(*weights):
        return ops.encode_topk(*weights, 3).values

    assert (values(*inputs) == 0).any(), "a row with fewer than k positive ones is wanted too"
    assert torch.autograd.gradcheck(values, inputs)


def test_gradients_of_decode_are_those_of_finite_differences():
    torch.manual_seed(0)
    indices = torch.tensor([[0, 3, 3], [4, 0, 1]])  # a feature twice in a row, one never
    inputs = (double(2, 3), double(5, 4))
    assert torch.autograd.gradcheck(lambda values, rows: ops.gather_decode(values, indices, rows), inputs)


def test_an_sae_through_the_operators_has_the_gradients_of_one_in_plain_torch():
    torch.manual_seed(1)
    x, W_enc, bias, W_dec = double(9, 6), double(6, 20), double(20), double(20, 6)

    def grads(reconstruction):
        return torch.autograd.grad((reconstruction - x).square().mean(), (x, W_enc, bias, W_dec))

    values, indices, _ = ops.encode_topk(x, W_enc, bias, 4)
    best, at = (x @ W_enc + bias).topk(4)
    dense = torch.zeros(9, 20, dtype=torch.float64).scatter(1, at, best.relu())
    for ours, theirs in zip(grads(ops.gather_decode(values, indices, W_dec)), grads(dense @ W_dec), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_operators_are_good_citizens_of_pytorch():
    x, W_enc, bias = torch.randn(5, 4), torch.randn(4, 9), torch.randn(9)
    W_dec = torch.randn(9, 4)
    values, indices, _ = ops.encode_topk(x, W_enc, bias, 3)
    turbolens = torch.ops.turbolens

    def leaf(tensor):
        return tensor.clone().requires_grad_()

    opcheck(turbolens.encode_topk, (x, W_enc, bias, 3))
    opcheck(turbolens.encode_topk, (leaf(x), leaf(W_enc), leaf(bias), 3))
    opcheck(turbolens.encode_jumprelu, (x.half(), W_enc, bias, torch.rand(9), 4))
    opcheck(turbolens.gather_decode, (leaf(values), indices, leaf(W_dec)))
    edits = (
        torch.ones(1, 5), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 4]), torch.randn(2, 5),
        torch.randn(2, 5), W_dec, values[None], indices[None],
    )  # fmt: skip
    opcheck(turbolens.apply_edits, (x[None].half(), *edits))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W, b: ops.encode_topk(x, W, b, 0), "k: 1 to 9, not 0"),
        (lambda x, W, b: ops.encode_topk(x, W, b, 10), "k: 1 to 9, not 10"),
        (lambda x, W, b: ops.encode_topk(x[:, :3], W, b, 2), r"x: \[N, 4\], not \[5, 3\]"),
        (lambda x, W, b: ops.encode_topk(x, W, b[:8], 2), r"bias: \[9\], not \[8\]"),
        (lambda x, W, b: ops.encode_jumprelu(x, W, b, b, 10), "max_l0: 1 to 9, not 10"),
        (lambda x, W, b: ops.encode_jumprelu(x, W, b, b[:1], 2), "threshold: "),
        (lambda x, W, b: ops.gather_decode(x, torch.zeros(5, 3, dtype=torch.int64), W), "values and indices: "),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 4), torch.randn(4, 9), torch.randn(9))


def test_a_gpu_is_served_by_what_the_table_names(monkeypatch):
    fused = pytest.importorskip("turbolens_server.kernels.fused", reason="needs Triton")
    for kernel in choice.SERVES_ON_CUDA:
        for name, module in (("plain", plain), ("fused", fused)):
            monkeypatch.setitem(choice.SERVES_ON_CUDA, kernel, name)
            assert choice.implementation(kernel) is module


def test_every_fused_kernel_takes_what_its_plain_one_takes():
    fused = pytest.importorskip("turbolens_server.kernels.fused", reason="needs Triton")
    for name in choice.SERVES_ON_CUDA:
        ours = inspect.signature(getattr(fused, name)).parameters
        assert [p for p in ours if p != "tiles"] == list(inspect.signature(getattr(plain, name)).parameters)
