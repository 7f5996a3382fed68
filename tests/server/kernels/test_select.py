"""What is selected on a CPU is what the slow twin selects, however the work is cut up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_server.kernels import select, twin

ODD = (math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-45)


@st.composite
def matrices(draw):
    """Pre-activations with ties, zeros of both signs, and what is no number, each in matrices of one width."""
    width, rows = draw(st.integers(1, 20)), draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = []
    for count in rows:
        pre = torch.randint(-3, 4, (count, width), generator=generator).float()
        odd = torch.tensor(ODD)[torch.randint(len(ODD), pre.shape, generator=generator)]
        made.append(torch.where(torch.rand(pre.shape, generator=generator) < draw(st.sampled_from([0, 0.2])), odd, pre))
    return made


@pytest.mark.parametrize(("at_once", "threads"), [(2**17, 1), (1, 1), (8, 4)])
def test_it_is_the_twin_bit_by_bit(at_once, threads, monkeypatch):
    monkeypatch.setattr(select, "_AT_ONCE", at_once)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    @given(matrices(), st.data())
    def check(pre, data):
        k = data.draw(st.integers(1, pre[0].shape[1]))
        for given_, (values, indices) in zip(pre, select.select_topk(pre, k), strict=True):
            expected, chosen = twin.select_topk(given_, k)
            torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
            assert not values.signbit()[~values.isnan()].any()
            number = ~expected.isnan()  # one NaN is as large as another
            assert torch.equal(indices[number], chosen[number])
            assert all(len(set(row)) == k for row in indices.tolist())

    check()


def test_what_is_selected_from_is_left_as_it_was():
    pre = torch.randn(5, 9)
    before = pre.clone()
    select.select_topk([pre], 3)
    assert torch.equal(pre, before)
