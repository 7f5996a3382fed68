"""Random weights: the real model's architecture, the same weights every time, and the same path through the engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from turbolens_server.engine.types import Job
from turbolens_server.loading import random_sdxl
from turbolens_server.loading.errors import LoadError
from turbolens_server.loading.load import load_engine
from turbolens_server.steering.edits import Edit, Unit, WeightedFeature
from turbolens_server.unet.points import DEFAULT_HOOK_POINTS
from turbolens_server.unet.tapped import check_supported, find_hook_points

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def random_engine():
    return load_engine(model="random:mini")


def job(engine, seed: int = 7, **settings) -> Job:
    return Job("a big red star", seed, 1, *engine.info.default_size, **settings)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sdxl_turbo_has_the_published_parameter_counts_and_hook_points():
    parts = random_sdxl.architecture("random:sdxl-turbo")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(parts.unet))
        first = CLIPTextModel(CLIPTextConfig.from_dict(dict(parts.text_encoder)))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(parts.text_encoder_2)))
        vae = AutoencoderKL.from_config(dict(parts.vae))
    assert count(unet) == 2_567_463_684
    assert count(first) == 123_060_480
    assert count(second) == 694_659_840
    assert count(vae) == 83_653_863
    check_supported(unet)
    points = find_hook_points(unet, 2 ** (len(parts.vae["block_out_channels"]) - 1))
    assert {name: (points[name].d_model, points[name].grid(512, 512)) for name in DEFAULT_HOOK_POINTS} == dict.fromkeys(
        DEFAULT_HOOK_POINTS, (1280, (16, 16))
    )


def test_its_tokenizer_takes_any_text_and_ends_it_as_clip_does():
    tokenizer = random_sdxl._tokenizer("random:sdxl-turbo", "tokenizer", "<|endoftext|>")
    second = random_sdxl._tokenizer("random:sdxl-turbo", "tokenizer_2", "!")
    short = tokenizer("a cat 漢🦊", padding="max_length", max_length=77).input_ids
    assert len(short) == 77
    assert (short[0], short[-1], second("", padding="max_length", max_length=77).input_ids[-1]) == (49406, 49407, 0)
    assert 49407 not in short[:5], "no byte may be unknown: the unknown token is the end token"
    assert len(tokenizer("x" * 300, truncation=True, max_length=77).input_ids) == 77


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = []
    for seed in (0, 0, 1):
        pipeline, model_hash = random_sdxl.random_pipeline("random:mini", CPU, torch.float32, seed)
        weights.append((model_hash, pipeline.unet.conv_in.weight, pipeline.text_encoder_2.text_projection.weight))
    assert weights[0][0] == weights[1][0] != weights[2][0]
    for first, second, other in zip(weights[0][1:], weights[1][1:], weights[2][1:], strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_finite_and_of_the_type_asked_for(dtype):
    pipeline, _ = random_sdxl.random_pipeline("random:mini", CPU, dtype)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
        assert all(torch.isfinite(parameter).all() for parameter in part.parameters())
        assert not any(buffer.is_meta for buffer in part.buffers())


def test_it_generates_the_same_picture_again_and_extracts(random_engine):
    names = tuple(random_engine.info.saes)
    assert names == DEFAULT_HOOK_POINTS
    first, second = (random_engine.run([job(random_engine, saes=names)])[0] for _ in range(2))
    assert np.array_equal(first.picture, second.picture)
    assert first.picture.std() > 5
    for codes in first.features:
        k = random_engine.info.saes[codes.sae].bundle.k
        assert (codes.counts == k).mean() > 0.9
        assert len(np.unique(codes.indices)) > k, "positions must differ"


def test_every_kind_of_edit_changes_its_picture(random_engine):
    codes = random_engine.run([job(random_engine, saes=("mid.0",))])[0].features[0]
    active = (WeightedFeature("mid.0", int(np.bincount(codes.indices).argmax())),)
    edits = [
        Edit(kind, active, amount, unit)
        for kind, amount in (("add", 8.0), ("scale", 0.0), ("set", 3.0), ("replace", 1.0))
        for unit in (Unit.MEAN, Unit.NORM)
    ]
    plain, *steered = random_engine.run([job(random_engine, edits=(edit,) if edit else ()) for edit in (None, *edits)])
    for edit, result in zip(edits, steered, strict=True):
        assert not np.array_equal(plain.picture, result.picture), edit


def test_its_bundles_are_sound(random_engine):
    info = random_engine.info
    for sae in info.saes.values():
        weights, stats = sae.bundle.weights, sae.bundle.stats
        assert sae.bundle.model_hash == info.model_hash
        assert torch.allclose(weights.W_dec.norm(dim=-1), torch.ones(sae.bundle.d_sae))
        assert {getattr(stats, f.name).dtype.kind for f in dataclasses.fields(stats)} == {"f", "i"}
        assert (stats.mean > 0).all()
        assert stats.norm_at(999) > 0
    assert len({sae.bundle.hash for sae in info.saes.values()}) == 4


def test_what_does_not_exist_is_refused_in_one_line():
    with pytest.raises(LoadError, match=r"random:sdxl: no such model; there are random:sdxl-turbo and random:mini"):
        load_engine(model="random:sdxl")
    with pytest.raises(LoadError, match="--variant fp16: random:mini has no weight files"):
        load_engine(model="random:mini", variant="fp16")
