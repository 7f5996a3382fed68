from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.info import EngineInfo, SaeInfo
from turbolens_server.engine.types import Job
from turbolens_server.sae.bundle import Bundle, SaeWeights
from turbolens_server.unet.torch_unet import TorchUNet
from turbolens_training.activations.reservoir import Reservoir
from turbolens_training.activations.stream import SceneStream, collect_updates


def stream(engine: Engine, **changes) -> SceneStream:
    settings = {"seed": 1, "split": "training", "images": 2, "one_step_share": 0.5, "multi_steps": (2, 3, 4)}
    return SceneStream(engine, **{**settings, **changes})


def test_a_chunk_is_a_function_of_seed_split_and_index(tiny_engine: Engine) -> None:
    first, again = stream(tiny_engine).tokens(3, 5), stream(tiny_engine).tokens(3, 5)
    assert list(first) == [point.name for point in tiny_engine.info.hook_points]
    for name, tokens in first.items():
        assert torch.equal(tokens, again[name])
        assert tokens.shape[0] % (2 * 5) == 0
    codes = stream(tiny_engine).chunk(3).codes
    for other in (stream(tiny_engine, seed=2), stream(tiny_engine, split="held out")):
        assert not torch.equal(codes, other.chunk(3).codes)


def test_the_mix_covers_the_timesteps_that_are_served(tiny_engine: Engine) -> None:
    mixed = stream(tiny_engine, images=1)
    steps = [mixed.steps_of(index) for index in range(400)]
    assert 0.4 < steps.count(1) / len(steps) < 0.6
    assert set(steps) == {1, 2, 3, 4}
    seen = set()
    for wanted in (1, 2, 3, 4):
        seen |= set(mixed.chunk(steps.index(wanted)).updates.timesteps)
    assert seen == {999, 749, 666, 499, 332, 249}


@pytest.mark.parametrize("steps", [1, 3])
def test_updates_are_those_that_the_engine_serves(tiny_engine: Engine, steps: int) -> None:
    """The engine's features, read through an SAE that keeps everything, are those of the collected updates."""
    prompts, seeds = ["a red star", "two things; snow"], [7, 8]
    updates = collect_updates(tiny_engine, prompts, seeds, steps)
    engine = with_identity_saes(tiny_engine)
    size = engine.info.default_size
    pairs = zip(prompts, seeds, strict=True)
    jobs = [Job(p, s, steps, *size, saes=tuple(engine.info.saes), picture=False) for p, s in pairs]
    for row, result in enumerate(engine.run(jobs)):
        assert result is not None
        for codes in result.features:
            update = updates.by_block[codes.sae][codes.step, row]
            dense = engine.saes[codes.sae].encode(update)
            active = dense.values > 0
            assert np.array_equal(active.sum(-1).numpy(), codes.counts)
            assert np.abs(dense.values[active].numpy() - codes.values).max() < 1e-4


def with_identity_saes(engine: Engine) -> Engine:
    infos = {}
    for point in engine.info.hook_points:
        d = point.d_model
        weights = SaeWeights(torch.eye(d), torch.zeros(d), torch.eye(d), torch.zeros(d))
        bundle = Bundle(point.name, point.name, "topk", d, weights, None, "", None, {})
        infos[point.name] = SaeInfo(point.name, point.name, bundle, False)
    info: EngineInfo = dataclasses.replace(engine.info, saes=infos)
    return Engine(engine.components, TorchUNet(engine.components.unet), info, torch.device("cpu"))


def test_positions_are_sampled_without_doubles(tiny_engine: Engine) -> None:
    some = stream(tiny_engine, one_step_share=1.0)
    whole = some.chunk(0).updates.by_block["mid.0"][0]  # [2, P, d]
    taken = some.tokens(0, 3)["mid.0"].unflatten(0, (2, 3))
    for picture in range(2):
        found = (whole[picture][None] == taken[picture][:, None]).all(-1).nonzero()[:, 1]
        assert len(set(found.tolist())) == 3


def test_a_reservoir_fills_then_replaces_at_random() -> None:
    g = torch.Generator().manual_seed(0)
    reservoir = Reservoir(100, 1, torch.device("cpu"))
    reservoir.put(torch.arange(60.0)[:, None], g)
    assert not reservoir.full
    assert set(reservoir.draw(500, g)[:, 0].tolist()) <= set(range(60))
    reservoir.put(torch.arange(60.0, 120)[:, None], g)
    assert reservoir.full
    kept = set(reservoir.rows[:, 0].tolist())
    assert len(kept) == 100
    assert len(kept & set(range(60, 120))) >= 40 + 5
    assert len(kept & set(range(60))) < 60

    twin = Reservoir(100, 1, torch.device("cpu"))
    twin.load_state_dict(reservoir.state_dict())
    assert torch.equal(twin.rows, reservoir.rows)
