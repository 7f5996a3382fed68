"""A pass cut at its hook points is the pass, bit for bit, whatever a tap does in between."""

from __future__ import annotations

import pytest
import torch

from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.segments import STEERED, cut_at_points
from turbolens_server.unet.spec import GraphSpec
from turbolens_server.unet.tapped import tapped_forward

POINTS = ("mid.0", "up.0.0.attn2.0", "up.0.1")


@pytest.fixture(scope="module")
def small_torch(small_model):
    from turbolens_server.loading.load import load_engine

    folder, saes = small_model
    return load_engine(model=str(folder), saes=[str(saes)], backend="torch")


def inputs_of(engine, batch: int) -> list[torch.Tensor]:
    parts, info = engine.components, engine.info
    spec = GraphSpec.of(parts.unet.config, info.hook_points, parts.vae_downscale, info.max_prompt_tokens)
    generator = torch.Generator().manual_seed(batch)
    shapes = [spec.input_shape(name, batch, 16, 16) for name in ("sample", "text", "pooled", "time_ids")]
    sample, *heard = (torch.randn(shape, generator=generator) for shape in shapes)
    return [sample, torch.full((batch,), 500.0), *heard]


@torch.inference_mode()
@pytest.mark.parametrize(("traced", "batches"), [(1, (1,)), (2, (2, 5))])
def test_a_chain_of_segments_is_the_whole_pass(small_torch, traced, batches):
    unet = small_torch.components.unet
    names, segments = cut_at_points(unet, POINTS, inputs_of(small_torch, traced))
    assert [segment.point for segment in segments] == [*POINTS, None]
    for batch in batches:
        sample, timestep, *heard = given = inputs_of(small_torch, batch)
        seen: dict[str, torch.Tensor] = {}

        def steer(point, update, grid, seen=seen):
            assert update.shape[1] == grid[0] * grid[1]
            seen[point] = update
            return 1.5 * update

        expected = tapped_forward(
            unet, sample, timestep, Conditions(*heard), tap=steer, at=frozenset(POINTS)
        )  # fmt: skip
        values = dict(zip(names, given, strict=True))
        for segment in segments:
            out = segment.module(*(values[name] for name in segment.takes))
            values |= dict(zip(segment.gives, out, strict=True))
            if segment.point is not None:
                assert torch.equal(out[-1], seen[segment.point])
                values[STEERED] = 1.5 * out[-1]
        assert torch.equal(out[-1], expected)
