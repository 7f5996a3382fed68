"""What is selected on a CPU is what the slow twin selects, however the work is cut up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.kernels import select, select_native, twin
from turbolens_server.unet import native
from turbolens_server.unet.compiled import compiler_missing

ODD = (math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-45)


@pytest.fixture(scope="module")
def by_native_code(tmp_path_factory):
    if missing := compiler_missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("select")
    native.build_select(folder)
    return select_native.load(folder / native.SELECT)


@pytest.fixture(params=["numpy", "native"])
def pick(request):
    return None if request.param == "numpy" else request.getfixturevalue("by_native_code")


@st.composite
def matrices(draw):
    """Pre-activations with ties, zeros of both signs, and what is no number."""
    rows, width = draw(st.integers(0, 9)), draw(st.integers(1, 20) | st.integers(60, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pre = torch.randint(-3, 4, (rows, width), generator=generator).float()
    odd = torch.tensor(ODD)[torch.randint(len(ODD), pre.shape, generator=generator)]
    return torch.where(torch.rand(pre.shape, generator=generator) < draw(st.sampled_from([0, 0.2])), odd, pre)


@pytest.mark.parametrize(("at_once", "threads"), [(2**17, 1), (1, 1), (8, 4)])
def test_it_is_the_twin_bit_by_bit(pick, at_once, threads, monkeypatch):
    monkeypatch.setattr(select, "_AT_ONCE", at_once)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    @given(matrices(), st.data())
    def check(pre, data):
        k = data.draw(st.integers(1, pre.shape[1]))
        values, indices = select.select_topk(pre, k, pick)
        expected, chosen = twin.select_topk(pre, k)
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
        assert not values.signbit()[~values.isnan()].any()
        number = ~expected.isnan()  # one NaN is as large as another
        assert torch.equal(indices[number], chosen[number])
        assert all(len(set(row)) == k for row in indices.tolist())

    check()


@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 1300),
    level=st.sampled_from([-3.0, -1.0, 0.0, 2.0]),  # from next to nothing positive to nearly all
    digits=st.sampled_from([0, 1, 7]),  # ties by rounding
    odd=st.sampled_from([0, 0.05]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_native_code_gives_the_bits_that_numpy_gives(by_native_code, rows, width, level, digits, odd, seed, data):
    random = np.random.default_rng(seed)
    pre = (random.standard_normal((rows, width)) + level).round(digits).astype(np.float32)
    pre = np.where(random.random(pre.shape) < odd, random.choice(np.array(ODD, np.float32), pre.shape), pre)
    k = data.draw(st.integers(1, width))
    found = [(np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)) for _ in range(2)]
    for pick, (values, indices) in zip((select.by_numpy, by_native_code), found, strict=True):
        pick(pre, values, indices)
    (values, indices), (native_values, native_indices) = found
    assert np.array_equal(values.view(np.uint32), native_values.view(np.uint32))
    assert np.array_equal(indices, native_indices)


def test_native_code_refuses_rows_that_are_not_beside_each_other(by_native_code):
    pre = np.zeros((4, 9), np.float32)[:, :5]
    with pytest.raises(ValueError, match="not beside each other"):
        by_native_code(pre, np.empty((4, 2), np.float32), np.empty((4, 2), np.int64))


def test_what_is_selected_from_is_left_as_it_was(pick):
    pre = torch.randn(5, 9)
    before = pre.clone()
    select.select_topk(pre, 3, pick)
    assert torch.equal(pre, before)
