"""Scenes, their codes, and the jitter that the noise decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolens_training.mini.scenes import (
    BACKGROUNDS,
    CODE_DIM,
    CODE_SIZES,
    COUNT,
    PLACES,
    RELATIONS,
    STYLES,
    THING_FIELDS,
    Scene,
    Thing,
    decode_scenes,
    encode_scenes,
    jitter_from_noise,
    sample_codes,
)

things = st.builds(Thing, **{name: st.sampled_from(vocabulary) for name, vocabulary in THING_FIELDS})


@st.composite
def scenes(draw):
    count = draw(st.integers(0, 2))
    layouts = {0: ("center",), 1: PLACES, 2: RELATIONS}[count]
    return Scene(
        tuple(draw(st.lists(things, min_size=count, max_size=count))),
        draw(st.sampled_from(layouts)),
        draw(st.sampled_from(BACKGROUNDS)),
        draw(st.sampled_from(STYLES)),
    )


@given(st.lists(scenes(), max_size=5))
def test_codes_round_trip(some):
    codes = encode_scenes(some)
    assert codes.shape == (len(some), CODE_DIM)
    assert decode_scenes(codes) == some


def test_samples_are_valid_varied_and_reproducible():
    codes = sample_codes(2000, torch.Generator().manual_seed(1))
    assert torch.equal(codes, sample_codes(2000, torch.Generator().manual_seed(1)))
    assert torch.equal(encode_scenes(decode_scenes(codes)), codes)  # decoding checks layouts
    for column, size in enumerate(CODE_SIZES):
        assert codes[:, column].unique().tolist() == list(range(size))
    assert codes[:, COUNT].bincount().min() > 60


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="laid out"):
        Scene((Thing(), Thing()), "center")
    with pytest.raises(ValueError, match="laid out"):
        Scene((Thing(),), "above")


@pytest.mark.parametrize("size", [16, 32])
def test_jitter_is_independent_standard_normals_at_every_resolution(size):
    noise = torch.randn(4000, 4, size, size, generator=torch.Generator().manual_seed(0))
    jitter = jitter_from_noise(noise)
    assert jitter.shape == (4000, 16)
    assert jitter.mean(0).abs().max() < 0.08
    assert (torch.cov(jitter.T) - torch.eye(16)).abs().max() < 0.12
