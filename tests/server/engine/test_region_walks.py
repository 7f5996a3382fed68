"""Regions: phrases heard under masks, held to plain softmax attention, and that nobody else hears them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from turbolens_server.engine.batcher import Batcher
from turbolens_server.engine.choosing import OWN
from turbolens_server.engine.engine import Engine
from turbolens_server.engine.lanes import Lanes
from turbolens_server.engine.regions import hear_regions, region_bias
from turbolens_server.engine.types import Guidance, Job, Reference, Region
from turbolens_server.steering.edits import Edit, WeightedFeature
from turbolens_server.steering.masks import Box, BoxMask, GridMask, PictureMask
from turbolens_server.unet.fused import FusedBlocks, _attention
from turbolens_server.unet.tapped import attention_blocks
from turbolens_server.unet.torch_unet import TorchUNet

PROMPT = "a big red star left of a small blue ring, night background"
LEFT, RIGHT = (BoxMask((Box(*edges),)) for edges in ((0, 0, 0.5, 1), (0.5, 0, 1, 1)))
EVERYWHERE = BoxMask((Box(0, 0, 1, 1),))
NOWHERE = GridMask({(n, n): np.zeros((n, n), np.float32) for n in (4, 8, 16, 32)})
SOFT = PictureMask(np.linspace(0, 1, 16, dtype=np.float32)[None].repeat(16, 0))
REGIONS = (Region(LEFT, "a big green square"), Region(SOFT, "a small pink cross"))
CLOSE = 1e-3
"""Of the largest latent: what another order of adding makes of float32 over one or two steps of `mini`."""


def job(*regions: Region, seed: int = 7, steps: int = 2, **more) -> Job:
    return Job(PROMPT, seed, steps, 128, 128, regions=regions, **more)


def apart(one, other) -> float:
    return float(np.abs(one.latents - other.latents).max() / np.abs(other.latents).max())


def twin(q: np.ndarray, k: np.ndarray, v: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Attention of one head by its definition, number by number: q [P, d], k and v [tokens, d], weights [P, tokens]
    how often each position hears each token."""
    out = np.zeros((len(q), v.shape[1]))
    for position in range(len(q)):
        told = [
            w * np.exp(q[position] @ key / np.sqrt(q.shape[1])) for w, key in zip(weights[position], k, strict=True)
        ]
        out[position] = sum(share * value for share, value in zip(told, v, strict=True)) / sum(told)
    return out


masks = hnp.arrays(np.float32, (2, 2, 3), elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32))


@given(st.lists(masks, min_size=1, max_size=2), st.integers(0, 2**16))
def test_a_mask_weighs_tokens_as_the_twin_says(lanes, seed):
    tokens, heads, width = 3, 2, 4
    rng = torch.Generator().manual_seed(seed)
    bias = region_bias([list(lane) for lane in lanes], tokens)
    q, k, v = (torch.randn(len(lanes), n, heads * width, generator=rng) for n in (6, 9, 9))
    found = _attention(q, k, v, heads, bias).numpy()
    for row, lane in enumerate(lanes):
        weights = np.concatenate([np.ones((6, tokens)), *(m.reshape(6, 1).repeat(tokens, 1) for m in lane)], 1)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            expected = twin(*(part[row, :, own].double().numpy() for part in (q, k, v)), weights)
            assert np.abs(found[row][:, own] - expected).max() < 1e-5


@settings(max_examples=5, deadline=None)
@given(st.lists(hnp.arrays(np.float32, (4, 4), elements=st.floats(0, 1, width=32)), min_size=1, max_size=3))
def test_a_phrase_that_is_the_prompt_changes_nothing_under_any_mask(engine, given):
    """In exact numbers each token only counts 1 + m times instead of once."""
    regions = [Region(PictureMask(mask), PROMPT) for mask in given]
    (plain,), (found,) = engine.run([job(steps=1)]), engine.run([job(*regions, steps=1)])
    assert apart(found, plain) < CLOSE


def test_a_region_under_an_empty_mask_is_none(engine):
    (plain,), (found,) = engine.run([job()]), engine.run([job(Region(NOWHERE, "a big green square"))])
    assert apart(found, plain) < CLOSE


def test_a_phrase_is_heard_under_its_mask_alone(engine):
    """In the first block that hears text: there nothing has yet gone from one position to another."""
    name, *_ = next(attention_blocks(engine.components.unet))
    point, seen = f"{name}.attn2.0", []

    class Tap:
        at, closed = frozenset([point]), frozenset()

        def __call__(self, _, update, grid):
            seen.append(update.clone().unflatten(1, grid)[0])
            return update

    for regions in ((), (Region(LEFT, "a big green square"),)):
        batch = [job(*regions)]
        lanes = Lanes.of(batch)
        text = engine.components.text.encode_all([PROMPT])
        text, bias = hear_regions(text, batch, lanes, engine.components.text, engine.info.region_strides)
        # Any text: in that layer the model looks at the beginnings of its windows, which are alike in every text.
        noise = torch.randn(1, 2 * 77, text.hidden.shape[2], generator=torch.Generator().manual_seed(0))
        text = dataclasses.replace(text, hidden=noise[:, : text.hidden.shape[1]])
        walk = engine.begin(text, [7], 2, bias=bias)
        walk.step(walk.timesteps[0], Tap())
    plain, found = seen
    half = plain.shape[1] // 2
    moved = (found - plain).abs().amax(-1) / plain.abs().max()
    assert moved[:, :half].median() > 1e-2
    assert moved[:, half:].max() < 1e-5


def test_overlapping_regions_are_all_heard_and_their_order_says_nothing(engine):
    (found,), (turned,) = engine.run([job(*REGIONS)]), engine.run([job(*REGIONS[::-1])])
    (one,) = engine.run([job(REGIONS[0])])
    assert apart(found, turned) < CLOSE
    assert apart(one, found) > 0.05


def test_compiled_blocks_hear_regions_as_the_modules_do(engine):
    unet = engine.components.unet
    fused = Engine(engine.components, TorchUNet(unet, FusedBlocks(unet, backend="eager")), engine.info, engine.device)
    steered = Edit("add", (WeightedFeature("up.0.1", 3),), 4.0, mask=RIGHT)
    for regions in (REGIONS[:1], REGIONS):
        batch = [job(*regions), job(*regions, edits=(steered,))]
        for ours, theirs in zip(fused.run(batch), engine.run(batch), strict=True):
            assert apart(ours, theirs) < CLOSE


def test_only_the_pictures_own_lane_and_the_own_run_hear(engine):
    guided = job(*REGIONS, guidance=Guidance(4.0), references=(Reference(OWN, PROMPT, 7), Reference("r", "x", 1)))
    lanes = Lanes.of([guided])
    text = engine.components.text.encode_all([lane.prompt for lane in lanes.rows])
    heard, bias = hear_regions(text, [guided], lanes, engine.components.text, engine.info.region_strides)
    tokens = text.hidden.shape[1]
    assert torch.equal(heard.hidden[:, :tokens], text.hidden)
    assert torch.equal(heard.pooled, text.pooled)
    for added in bias.values():
        assert not added[:, :, :tokens].any()
        hears = added[:, :, tokens:].isfinite().flatten(1).any(1).tolist()
        assert hears == [lane.walk in (0, 1) and row < len(lanes.seeds) for row, lane in enumerate(lanes.rows)]


def test_jobs_run_with_those_of_as_many_regions():
    batcher = Batcher(max_batch=8, wait_s=0)
    batcher.add("a", [job(), job(*REGIONS), job(seed=3), job(REGIONS[0]), job(*REGIONS, seed=4)])
    assert [[slot.index for slot in batcher.take()] for _ in range(3)] == [[0, 2], [1, 4], [3]]


def test_jobs_without_regions_are_refused_a_batch_with_them(engine):
    with pytest.raises(ValueError, match="the number of regions"):
        engine.run([job(), job(*REGIONS)])


def test_mates_with_other_regions_keep_every_bit(engine):
    mate = job(*REGIONS, seed=3, saes=("up.0.1",))
    beside = [job(*REGIONS[::-1], guidance=None), job(Region(EVERYWHERE, "snow"), Region(NOWHERE, "x"), seed=9)]
    found = [engine.run([other, mate])[1] for other in beside]
    assert np.array_equal(found[0].latents, found[1].latents)
    assert np.array_equal(found[0].picture, found[1].picture)
    for one, other in zip(found[0].features, found[1].features, strict=True):
        assert np.array_equal(one.values, other.values)


def test_a_long_phrase_is_counted_too(engine):
    (result,) = engine.run([job(Region(LEFT, "snow " * 200))])
    assert result.tokens_cut > 100


def test_what_a_window_has_no_room_for_is_heard_from_a_second_one_under_the_same_mask(engine):
    first, second = ", ".join(["a big green square"] * 15), ", ".join(["a small pink cross"] * 15)
    (cut,) = engine.run([job(Region(LEFT, f"{first}, {second}"))])
    (whole,) = engine.run([job(Region(LEFT, first), Region(LEFT, second))])
    (one,) = engine.run([job(Region(LEFT, first))])
    assert cut.tokens_cut > 0
    assert whole.tokens_cut == 0
    assert apart(whole, one) > 0.05
    assert apart(whole, cut) > 0.05
